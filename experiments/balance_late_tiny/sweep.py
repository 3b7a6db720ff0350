"""The rules of experiments/balance_late, untouched, on `tiny` itself."""

import pathlib

from dsv3.overlay import module_of

BASE = "base"
BASELINE = "sequence"
METRICS = ["loss", "max_vio"]
SEEDS = range(3, 9)  # those before were run in experiments/balance_rest

LATE = module_of(pathlib.Path(__file__).parents[1] / "balance_late/sweep.py")
runs, answer = LATE.runs, LATE.answer
