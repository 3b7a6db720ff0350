"""experiments/README.md: every question with the paper's answer and ours.

Words come from the README of an experiment: its heading, and the paragraphs
that begin with **Question.**, **Paper.** and **Verdict.**; numbers of runs and
commits from its results.jsonl.
"""

import collections
import pathlib
import re
from collections.abc import Sequence

from dsv3.config import ConfigError
from dsv3.lab import experiment, results, table

HEADS = ("question", "paper", "ours: verdict", "runs", "commit")


def index(folder: pathlib.Path) -> str:
  """The table over all experiments in `folder`, as Markdown."""
  places = sorted(path.parent for path in folder.glob("*/README.md"))
  if not places:
    raise ConfigError(f"{folder}: found no experiment with a README.md")
  rows = [HEADS, ["---"] * len(HEADS), *map(_row, places)]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(place: pathlib.Path) -> Sequence[str]:
  text = (place / "README.md").read_text()
  heading = re.search(r"^# (.+)$", text, re.MULTILINE)
  name = heading[1] if heading else place.name
  question = paragraph(text, "Question") or name
  return [
    f"[{_cell(name)}]({place.name}/README.md)"
    + (f": {_cell(question)}" if question != name else ""),
    _cell(paragraph(text, "Paper")),
    _cell(paragraph(text, "Verdict")) or "not run yet",
    *_runs(place, text),
  ]


def paragraph(text: str, name: str) -> str:
  """The first sentence or two of the paragraph that begins with **NAME**.

  >>> paragraph("**Paper.** Yes, by 0.1\\nnats.\\n\\nMore.", "Paper")
  'Yes, by 0.1 nats.'
  """
  found = re.search(rf"\*\*{name}\b[^*]*\*\*(.+?)(\n\s*\n|\Z)", text, re.DOTALL)
  return " ".join(found[1].split()) if found else ""


def _runs(place: pathlib.Path, text: str) -> list[str]:
  """Runs of the arms that there are now, seeds of each, and their commits.

  Of a question without a sweep what its README says: **Runs.** N, at COMMIT.
  """
  if not (place / "sweep.py").is_file():
    said, _, commit = paragraph(text, "Runs").rstrip(".").partition(", at ")
    return [said, commit]
  asked = experiment.load(place)
  arms = {run.id for run in asked.runs}
  lines = [
    line
    for (id_, _), line in results.read(asked.results).items()
    if id_ in arms and not line["error"]
  ]
  seeds = collections.Counter(line["id"] for line in lines)
  counted = f"{len(lines)} of {len(arms)} arms" if lines else "0"
  if seeds:
    some = f" ({len(seeds)} of them run)" if len(seeds) < len(arms) else ""
    least, most = min(seeds.values()), max(seeds.values())
    counted += f"{some}, n = {least}" + (f" to {most}" if most > least else "")
  commits = sorted({line.get("commit", "")[:7] for line in lines})
  return [counted, ", ".join(commits)]


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


def write(folder: pathlib.Path) -> pathlib.Path:
  """Puts the table into `folder`/README.md, between its marks."""
  path = folder / "README.md"
  if not path.is_file():
    path.write_text(f"# Experiments\n\n{table.BEGIN}\n{table.END}\n")
  if not table.into_readme(path, index(folder)):
    raise ConfigError(f"{path}: found no line {table.BEGIN}, wanted it")
  return path
