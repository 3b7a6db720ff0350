"""How large should the model be for a budget?"""

import pathlib

from dsv3.lab import ladder

BASE = str(pathlib.Path(__file__).parents[1] / "ablation.py")
SEEDS = range(2)
BUDGETS = (0.5e12, 1e12, 2e12)  # training FLOPs


def size(dim, layers):
  """Widths in the proportions of `tiny`."""
  return {
    "model.dim": dim,
    "model.n_layers": layers,
    "model.dense_hidden": 3 * dim,
    "model.attention.q_rank": dim // 2,
    "model.attention.kv_rank": dim // 2,
    "model.attention.n_heads": dim // 32,
    "model.attention.n_kv_heads": dim // 32,
    "model.moe.hidden": 3 * dim // 4,
  }


SIZES = {
  f"d{dim}": size(dim, layers)
  for dim, layers in ((32, 3), (64, 3), (96, 4), (128, 4))
}


def runs():
  return ladder.ladder(BASE, BUDGETS, SIZES)


def answer(lines, folder):
  return ladder.answer(lines, BUDGETS, folder)
