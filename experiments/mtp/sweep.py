"""What do MTP modules bring, to the loss and to decoding?"""

from dsv3.lab.sweep import arms

BASE = "../ablation"
BASELINE = "depth=0"


def runs():
  # The main model is the same: equal main parameters and FLOPs (Table 4).
  return arms({f"depth={n}": {"model.mtp.depth": n} for n in range(3)})
