"""How even is the load if the bias follows a larger batch?"""

import pathlib

from dsv3.lab.sweep import arms
from dsv3.overlay import module_of

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]
SEEDS = range(6)


def runs():
  # 0.01: the speed at which a proportional bias was most even in
  # experiments/balance_settled.
  return arms(
    {
      "sequence": {
        "model.moe.balancing": "sequence",
        "schedule.balance_weight": 1e-3,
      },
      "proportional": {
        "model.moe.balancing": "bias",
        "model.moe.bias_step": "proportional",
        "schedule.bias_speed": 0.01,
      },
    }
  )


TENTH = pathlib.Path(__file__).parents[1] / "balance_settled/tenth.py"
answer = module_of(TENTH).answer
