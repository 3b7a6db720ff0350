"""Does the load stay even where the bias rests at the end, as in the report?"""

from dsv3.lab.sweep import arms

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]
SEEDS = range(3)
TOKENS = 14.8e12  # of the report, over which the config's shares are


def runs():
  bias = {"model.moe.balancing": "bias"}
  proportional = bias | {
    "model.moe.bias_step": "proportional",
    "schedule.bias_speed": 0.01,  # as in experiments/balance_large_batch
  }
  return arms(
    {
      "sequence": {
        "model.moe.balancing": "sequence",
        "schedule.balance_weight": 1e-3,
      },
      "bias": bias,
      "proportional": proportional,
      "rest": proportional | {"schedule.bias_speed_tokens": 0.8 * TOKENS},
    }
  )
