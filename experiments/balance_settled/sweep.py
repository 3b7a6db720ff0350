"""How even is the load once the bias has settled?"""

from dsv3.lab.sweep import arms

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]


def runs():
  loss = {"model.moe.balancing": "sequence", "schedule.balance_weight": 1e-3}
  return arms({"sequence": loss, "bias": {"model.moe.balancing": "bias"}})
