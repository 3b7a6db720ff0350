"""Does training in FP8 lose anything against BF16? (Fig. 10, App. B.2)

The arms of experiments/fp8_calm and experiments/fp8_trained too.
"""

from dsv3.lab.sweep import arms

BASE = "base"
BASELINE = "bf16"
METRICS = ["loss"]


def runs():
  recipe = lambda name: {"model.precision.recipe": name}
  return arms(
    {
      "bf16": {},
      "deepseek_v3": recipe("deepseek_v3"),
      "float32": {"model.dtype": "float32"},  # as far from BF16, without FP8
      "bf16_moments": {"optimizer.moment_dtype": "bfloat16"},  # Sec. 3.3.3
      "per_tensor": recipe("per_tensor"),
      "blockwise_128": recipe("blockwise_128"),  # App. B.2: it diverged
    }
  )
