"""How large should the model be for a budget?"""

import pathlib

from dsv3.lab import ladder

BASE = str(pathlib.Path(__file__).parent / "base.py")
SEEDS = range(3)
BUDGETS = (1.25e11, 2.5e11, 5e11)  # training FLOPs


HALF = {
  "model.attention.nope_dim": 16,
  "model.attention.rope_dim": 8,
  "model.attention.v_dim": 16,
}


def size(dim, layers):
  """Widths in the proportions of `tiny`; heads of 16 + 8 dims below 32."""
  heads = {} if dim >= 32 else HALF
  return {
    "model.dim": dim,
    "model.n_layers": layers,
    "model.dense_hidden": 3 * dim,
    "model.attention.q_rank": dim // 2,
    "model.attention.kv_rank": dim // 2,
    "model.attention.n_heads": max(dim // 32, 1),
    "model.attention.n_kv_heads": max(dim // 32, 1),
    "model.moe.hidden": 3 * dim // 4,
    **heads,
  }


SIZES = {
  f"d{dim}": size(dim, layers)
  for dim, layers in ((8, 2), (16, 3), (32, 3), (64, 3))
}


def runs():
  return ladder.ladder(BASE, BUDGETS, SIZES)


def answer(lines, folder):
  return ladder.answer(lines, BUDGETS, folder)
