"""MLA against MHA and GQA: what does a small cache cost?"""

import pathlib

from dsv3 import config, overlay
from dsv3.lab.matched import matched
from dsv3.lab.sweep import arms
from dsv3.plan import count

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


def cache_bytes(diff):
  """What decoding keeps of a token in all layers, in the type of the model."""
  model = config.build(overlay.overlay(overlay.load(BASE), diff)).model
  kept = count.cache_bytes_per_token(model, model.dtype)
  return kept[model.attention.kind], f"{model.n_layers} layers, {model.dtype}"


def answer(lines, folder):
  """The caches of all arms, by the planner's count."""
  found = {name: cache_bytes(diff) for name, diff in runs()}
  mla, of = found[BASELINE]
  parts = (f"{name} {n:,} ({n / mla:g} x)" for name, (n, _) in found.items())
  return [f"Cache of a token, {of}, bytes: {', '.join(parts)}."]
