"""How even is the load once the bias has settled?"""

from dsv3.lab.sweep import arms

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
