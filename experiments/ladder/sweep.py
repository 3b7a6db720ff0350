"""How large should the model be for a budget?"""

import pathlib
import statistics

from dsv3.config import ConfigError
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
  """The law through the best sizes, and its picture."""
  rungs = []
  notes = []
  for budget in BUDGETS:
    mine = [
      v
      for name, v in lines.items()
      if name.startswith(f"{budget:.2g}-".replace("+", ""))
    ]
    per_token = [
      statistics.fmean(x["flops"] / x["tokens"] for x in v) for v in mine
    ]
    loss = [statistics.fmean(x["final"]["loss"] for x in v) for v in mine]
    try:
      one = ladder.rung(budget, per_token, loss)
    except ConfigError as error:
      notes.append(f"{error}.")
      continue
    rungs.append(one)
    notes.append(
      f"{budget:.2g} FLOPs: best at {one.best:.3g} FLOPs a token, loss "
      f"{one.best_loss:.3f}" + ("." if one.inside else ", beyond the sizes.")
    )
  try:
    law = ladder.fit(rungs)
  except ConfigError as error:
    return [*notes, f"{error}."]
  ladder.draw(law).savefig(folder / "law.png", dpi=130)
  return [
    *notes,
    f"Best size = {law.coefficient:.3g} x FLOPs^{law.exponent:.2f}.",
  ]
