"""How even is the load if the bias is fast at first and slow at the end?"""

import pathlib

from dsv3.lab.sweep import arms
from dsv3.overlay import module_of

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]
SEEDS = range(6, 14)  # the rule was chosen by seeds 0 and 1
TOKENS = 14.8e12  # of the report, over which the config's shares are


def runs():
  return arms(
    {
      "sequence": {
        "model.moe.balancing": "sequence",
        "schedule.balance_weight": 1e-3,
      },
      "late": {
        "model.moe.balancing": "bias",
        "model.moe.bias_step": "proportional",
        "schedule.bias_speed": 0.03,
        "schedule.bias_speed_tokens": 0.9 * TOKENS,
        "schedule.bias_speed_late": 0.01,
      },
    }
  )


def answer(lines, folder):
  tenth = module_of(
    pathlib.Path(__file__).parents[1] / "balance_settled/tenth.py"
  )
  return tenth.answer(lines, folder)
