"""Do experts take domains apart, and does an auxiliary loss keep them from it?"""

import importlib.util
import itertools
import pathlib
import sysconfig

import numpy as np

from dsv3.overlay import module_of

BASE = "../balance/base"
BASELINE = "sequence"
METRICS = ["distance", "loss"]
HIGHER = ["distance"]

ROWS = 48  # of every domain
DOMAINS = {  # of Python's library, held out or not: which experts, not how well
  "code": ("asyncio/*.py", "email/*.py"),
  "English": ("pydoc_data/topics.py",),
  "tables": ("encodings/cp*.py", "encodings/iso*.py"),
}
DRAWN = ("sequence", "bias")


def runs():
  balance = pathlib.Path(__file__).parents[1] / "balance/sweep.py"
  return module_of(balance).runs()


def measure(workdir):
  """How far apart the loads of two domains are; draws those of some arms.

  The total variation distance, mean over pairs of domains and MoE layers: 0
  where two use the same experts equally, 1 where they share none.
  """
  from dsv3.lab import routing
  from dsv3.train.restore import restore

  trained = restore(workdir)
  tokens_BL, domains = _rows(trained)
  trace = routing.record(trained.model, tokens_BL)
  shares = [
    routing.relative_load(trace, rows) / trace.n_routed
    for rows in domains.values()
  ]
  pairs = itertools.combinations(shares, 2)
  run = pathlib.Path(workdir).name
  is_drawn = run.startswith(tuple(f"{arm}-s" for arm in DRAWN))
  if is_drawn and importlib.util.find_spec("matplotlib"):
    picture = pathlib.Path(__file__).parent / f"{run}.png"
    routing.draw(trace, domains).savefig(picture, dpi=100)
  return {
    "distance": float(np.mean([np.abs(a - b).sum(1) / 2 for a, b in pairs]))
  }


def _rows(trained):
  """Tokens of all domains, and which rows are of which."""
  from dsv3.commands.given import tokenizer_of

  tokenizer, length = tokenizer_of(trained), trained.values.data.seq_len
  rows, domains = [], {}
  for name, patterns in DOMAINS.items():
    ids = np.asarray(tokenizer.encode(_text(patterns)), np.int32)
    n_rows = len(ids) // length
    chosen = np.linspace(0, n_rows - 1, ROWS).astype(int)
    domains[name] = range(len(rows), len(rows) + ROWS)
    rows += list(ids[: n_rows * length].reshape(n_rows, length)[chosen])
  return np.stack(rows), domains


def _text(patterns) -> str:
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  paths = sorted(path for p in patterns for path in folder.glob(p))
  return "\n".join(path.read_text(errors="replace") for path in paths)
