"""FP8 against BF16 where rounding alone changes little (Fig. 10)."""

import pathlib

from dsv3.overlay import module_of

BASE = "base"
BASELINE = "bf16"
METRICS = ["loss"]
RELATIVE = True  # Fig. 10

FP8 = module_of(pathlib.Path(__file__).parents[1] / "fp8/sweep.py")


def runs():
  return FP8.some("bf16", "deepseek_v3", "per_tensor", "blockwise_128")
