"""A mixture of experts against a dense model of equal FLOPs a token."""

import pathlib

from dsv3.lab.matched import matched
from dsv3.lab.sweep import arms

BASE = str(pathlib.Path(__file__).parents[1] / "ablation.py")
BASELINE = "dense"


def runs():
  dense = matched(BASE, {"model.ffn": "dense"}, "model.dense_hidden")
  return arms({"moe": {}, "dense": dense})
