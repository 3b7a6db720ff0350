"""As `experiments/balance_large_batch`."""

BASE = "../balance_large_batch/base"
DIFF = {"name": "balance_late"}
