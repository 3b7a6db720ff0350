"""FP8 against BF16 where rounding alone changes little (Fig. 10)."""

from dsv3.lab.sweep import arms

BASE = "base"
BASELINE = "bf16"
METRICS = ["loss"]


def runs():
  return arms(
    {
      "bf16": {},
      "deepseek_v3": {"model.precision.recipe": "deepseek_v3"},
      "float32": {"model.dtype": "float32"},  # as far from BF16, without FP8
    }
  )
