"""All recipes of FP8 against BF16 on a model that is trained already (Fig. 10)."""

import pathlib

from dsv3.lab.sweep import arms, chain
from dsv3.overlay import module_of

BASE = "base"
BASELINE = "bf16"
METRICS = ["loss"]
FP8 = module_of(pathlib.Path(__file__).parents[1] / "fp8/sweep.py")


def runs():
  recipe = lambda name: {"model.precision.recipe": name}
  others = {name: recipe(name) for name in ("delayed", "mxfp8")}
  return chain(FP8.runs(), arms(others))
