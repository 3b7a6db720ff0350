"""Does it cost loss that a token goes to M of the groups of experts?"""

from dsv3.lab.sweep import over

BASE = "../ablation"
BASELINE = "top_groups=4"  # no limit
METRICS = ["loss", "max_vio"]


def runs():
  return over("model.moe.top_groups", [1, 2, 4])
