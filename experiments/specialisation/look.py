"""How far apart are the experts of different domains?

  python experiments/specialisation/look.py runs/balance

reads the runs of `experiments/balance` and prints, for every arm, the total
variation distance of the load of two domains: 0 where they use the same experts
equally, 1 where they share none. Draws the loads of two runs beside it.
"""

import collections
import itertools
import pathlib
import re
import statistics
import sys
import sysconfig

import numpy as np

from dsv3.commands.given import tokenizer_of
from dsv3.lab import routing
from dsv3.train.restore import Trained, restore

ROWS = 48  # of every domain
DOMAINS = {  # of Python's library, held out or not: which experts, not how well
  "code": ("asyncio/*.py", "email/*.py"),
  "English": ("pydoc_data/topics.py",),
  "tables": ("encodings/cp*.py", "encodings/iso*.py"),
}
DRAWN = ("sequence-s0", "bias-s0")


def text_of(patterns) -> str:
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  paths = sorted(path for p in patterns for path in folder.glob(p))
  return "\n".join(path.read_text(errors="replace") for path in paths)


def rows_of(trained: Trained):
  """Tokens of all domains, and which rows are of which."""
  tokenizer, length = tokenizer_of(trained), trained.values.data.seq_len
  rows, domains = [], {}
  for name, patterns in DOMAINS.items():
    ids = np.asarray(tokenizer.encode(text_of(patterns)), np.int32)
    n_rows = len(ids) // length
    chosen = np.linspace(0, n_rows - 1, ROWS).astype(int)
    domains[name] = range(len(rows), len(rows) + ROWS)
    rows += list(ids[: n_rows * length].reshape(n_rows, length)[chosen])
  return np.stack(rows), domains


def distance(trace: routing.Trace, domains) -> float:
  """Mean over layers and pairs of domains of the total variation distance."""
  shares = [
    routing.relative_load(trace, rows) / trace.n_routed
    for rows in domains.values()
  ]
  pairs = itertools.combinations(shares, 2)
  return float(np.mean([np.abs(a - b).sum(1) / 2 for a, b in pairs]))


def main(runs: pathlib.Path) -> None:
  found, here = collections.defaultdict(list), pathlib.Path(__file__).parent
  for folder in sorted(runs.glob("*-s*")):
    trained = restore(folder)
    tokens_BL, domains = rows_of(trained)
    trace = routing.record(trained.model, tokens_BL)
    found[re.sub(r"-s\d+$", "", folder.name)].append(distance(trace, domains))
    if folder.name in DRAWN:
      picture = here / f"{folder.name}.png"
      routing.draw(trace, domains).savefig(picture, dpi=100)
  print("| arm | n | distance, mean | least | most |\n|---|---|---|---|---|")
  for arm, of_arm in found.items():
    ends = f"{min(of_arm):.3f} | {max(of_arm):.3f}"
    mean = statistics.fmean(of_arm)
    print(f"| {arm} | {len(of_arm)} | {mean:.3f} | {ends} |")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
