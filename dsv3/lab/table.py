"""A comparison in words: Markdown for a README, columns for a terminal."""

import pathlib
from collections.abc import Sequence

from dsv3.lab.compare import EFFECT, Comparison, Row

BEGIN, END = "<!-- dsv3 compare -->", "<!-- end of dsv3 compare -->"


def columns(found: Comparison) -> list[str]:
  """Heads of `cells`."""
  costs = [f"{kind} x" for kind in unequal(found)]
  return [
    "arm",
    "n",
    f"{found.metric}, mean",
    "std",
    f"minus {found.baseline}",
    "95% interval",
    "verdict",
    *([f"n for {EFFECT}"] if _in_nats(found) else []),
    *costs,
  ]


def unequal(found: Comparison) -> list[str]:
  """The costs in which some arm differs from the baseline."""
  kinds = found.rows[0].cost
  far = lambda kind: any(abs(row.cost[kind] - 1) > 1e-3 for row in found.rows)
  return [kind for kind in kinds if far(kind)]


def _in_nats(found: Comparison) -> bool:
  return "loss" in found.metric


def cells(found: Comparison, row: Row) -> list[str]:
  """A row of the table, as text."""
  n = f"{len(row.values)}"
  failed = f" ({row.failed} failed)" if row.failed else ""
  inside = row.interval
  return [
    row.name,
    n + failed,
    number(row.mean) if row.values else "",
    number(row.std),
    f"{number(inside.mean, sign=True)}" if inside else _single(row),
    f"{number(inside.low, sign=True)} to {number(inside.high, sign=True)}"
    if inside
    else "",
    row.verdict,
    *([f"{row.needed:,}" if row.needed else ""] if _in_nats(found) else []),
    *(f"{row.cost[kind]:.3f}" for kind in unequal(found)),
  ]


def _single(row: Row) -> str:
  return "".join(number(d, sign=True) for d in row.differences.values())


def number(x: float | None, *, sign: bool = False) -> str:
  """Four decimals, or five digits where numbers are large.

  >>> number(2.34567), number(-0.00012, sign=True), number(123456.0)
  ('2.3457', '-0.0001', '1.2346e+05')
  """
  if x is None:
    return ""
  return f"{x:{'+' if sign else ''}{'.4f' if abs(x) < 1000 else '.5g'}}"


def markdown(comparisons: Sequence[Comparison]) -> str:
  """Tables for a README, a metric each, and the notes on the first."""
  lines = []
  for found in comparisons:
    heads = columns(found)
    lines += [_line(heads), _line(["---"] * len(heads))]
    lines += [_line(cells(found, row)) for row in found.rows] + [""]
  return "\n".join([*lines, *comparisons[0].notes])


def _line(words: Sequence[str]) -> str:
  return f"| {' | '.join(words)} |"


def plain(comparisons: Sequence[Comparison]) -> str:
  """The same for a terminal."""
  lines = []
  for found in comparisons:
    rows = [columns(found), *(cells(found, row) for row in found.rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
      padded = (f"{x:<{w}}" for x, w in zip(row, widths))
      lines.append("  ".join(padded).rstrip())
    lines.append("")
  return "\n".join([*lines, *comparisons[0].notes])


def into_readme(path: pathlib.Path, text: str) -> bool:
  """Puts `text` between the marks of a README; False where it has none."""
  if not path.is_file():
    return False
  head, begin, rest = path.read_text().partition(BEGIN)
  _, end, tail = rest.partition(END)
  if not begin or not end:
    return False
  path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
  return True
