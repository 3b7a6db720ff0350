"""All recipes of FP8 against BF16 on a model that is trained already (Fig. 10)."""

import pathlib

from dsv3.overlay import module_of

BASE = "base"
BASELINE = "bf16"
METRICS = ["loss"]
RELATIVE = True  # Fig. 10
FP8 = module_of(pathlib.Path(__file__).parents[1] / "fp8/sweep.py")


def runs():
  return FP8.some(*FP8.ARMS)
