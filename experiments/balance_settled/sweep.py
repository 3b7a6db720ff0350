"""How even is the load once the bias has settled?"""

import pathlib

from dsv3.lab.sweep import arms
from dsv3.overlay import module_of

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]


def runs():
  loss = {"model.moe.balancing": "sequence", "schedule.balance_weight": 1e-3}
  bias = {"model.moe.balancing": "bias"}
  return arms(
    {
      "sequence": loss,
      "bias": bias,
      "bias=0.001": bias | {"schedule.bias_speed": 0.001},  # the report's
      "proportional=0.003": bias | {"model.moe.bias_step": "proportional"},
      "proportional=0.01": bias
      | {"model.moe.bias_step": "proportional", "schedule.bias_speed": 0.01},
    }
  )


TENTH = pathlib.Path(__file__).parents[1] / "balance_settled/tenth.py"
answer = module_of(TENTH).answer
