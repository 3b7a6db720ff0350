"""Bias, auxiliary losses, both or none: what balances, and at what price?"""

from dsv3.lab.sweep import arms

BASE = "base"
BASELINE = "sequence"  # as in Table 5 and the loss-free paper
METRICS = ["loss", "max_vio"]


def runs():
  # 0.001: the weight of the loss-free paper's baseline (arXiv 2408.15664,
  # Table 2). `both` is the report's own: 0.0001 (Sec. 4.2), and the bias.
  of_loss = lambda kind: {
    "model.moe.balancing": kind,
    "schedule.balance_weight": 1e-3,
  }
  return arms(
    {
      "sequence": of_loss("sequence"),
      "batch": of_loss("batch"),  # Sec. 4.5.3
      "bias": {"model.moe.balancing": "bias"},
      "both": {"model.moe.balancing": "bias+sequence"},
      "none": {"model.moe.balancing": "none"},
    }
  )
