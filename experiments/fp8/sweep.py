"""Does training in FP8 lose anything against BF16? (Fig. 10, App. B.2)

ARMS are those of experiments/fp8_calm and experiments/fp8_trained too.
"""

from dsv3.lab.sweep import arms

BASE = "base"
BASELINE = "bf16"
METRICS = ["loss"]
RECIPES = ("deepseek_v3", "per_tensor", "blockwise_128", "delayed", "mxfp8")
ARMS = {
  "bf16": {},
  "float32": {"model.dtype": "float32"},  # as far from BF16, without FP8
  "bf16_moments": {"optimizer.moment_dtype": "bfloat16"},  # Sec. 3.3.3
  **{name: {"model.precision.recipe": name} for name in RECIPES},
}


def some(*names: str):
  return arms({name: ARMS[name] for name in names})


def runs():
  return some("bf16", "deepseek_v3", "blockwise_128")
