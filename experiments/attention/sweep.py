"""MLA against MHA and GQA: what does a small cache cost?"""

import pathlib

from dsv3.lab.matched import matched
from dsv3.lab.sweep import arms

BASE = str(pathlib.Path(__file__).parents[1] / "ablation.py")
BASELINE = "mla"


def runs():
  # Experts take up what the attention leaves: equal parameters (V2, Table 9).
  equal = lambda diff: matched(
    BASE,
    {"model.attention.q_rank": 0, **diff},
    "model.moe.hidden",
    by="parameters",
    multiple=4,
  )
  return arms(
    {
      "mla": {},
      "mha": equal({"model.attention.kind": "mha"}),
      "gqa": equal(
        {"model.attention.kind": "gqa", "model.attention.n_kv_heads": 2}
      ),
      "mqa": equal(
        {"model.attention.kind": "gqa", "model.attention.n_kv_heads": 1}
      ),
    }
  )
