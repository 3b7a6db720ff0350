"""How even is the load if the bias has a speed for each part of a run?"""

import pathlib

from dsv3.lab.sweep import arms
from dsv3.overlay import module_of

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]
SEEDS = range(6, 14)  # the rule was chosen by seeds 0 and 1
TOKENS = 14.8e12  # of the report, over which the config's shares are


def runs():
  proportional = {
    "model.moe.balancing": "bias",
    "model.moe.bias_step": "proportional",
  }
  return arms(
    {
      "sequence": {
        "model.moe.balancing": "sequence",
        "schedule.balance_weight": 1e-3,
      },
      "late": proportional
      | {
        "schedule.bias_speed": 0.03,
        "schedule.bias_speed_tokens": 0.9 * TOKENS,
        "schedule.bias_speed_late": 0.01,
      },
      "slow_first": proportional
      | {
        "schedule.bias_speed": 0.003,
        "schedule.bias_speed_tokens": 0.5 * TOKENS,
        "schedule.bias_speed_late": 0.02,
      },
    }
  )


TENTH = pathlib.Path(__file__).parents[1] / "balance_settled/tenth.py"
answer = module_of(TENTH).answer
