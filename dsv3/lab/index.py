"""experiments/README.md: every question with the paper's answer and ours.

Words come from the README of an experiment: its heading, and the paragraphs
that begin with **Question.**, **Paper.** and **Verdict.**; numbers and commits
from its results.jsonl. An experiment without a sweep says them itself, in
paragraphs **Ours.** and **Runs.**.
"""

import pathlib
import posixpath
import re
import statistics
from collections.abc import Sequence

from dsv3.config import ConfigError
from dsv3.lab import compare, experiment, results, table

HEADS = ("question", "paper", "ours (n)", "verdict", "commit (+ changed)")
METRICS, ARMS = 2, 6  # of an experiment, at most, in its cell
_LINK = re.compile(r"\]\((?![a-z]+:|[#/])([^)]+)\)")  # to another file


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
  said = lambda words: _moved(_cell(words), place.name)
  is_swept = (place / "sweep.py").is_file()
  ours, commit = _measured(place) if is_swept else _said(text)
  return [
    f"[{_cell(name)}]({place.name}/README.md)"
    + (f": {said(question)}" if question != name else ""),
    said(paragraph(text, "Paper")),
    _cell(ours),
    said(paragraph(text, "Verdict")) or "not run yet",
    commit,
  ]


def paragraph(text: str, name: str) -> str:
  """The first sentence or two of the paragraph that begins with **NAME**.

  >>> paragraph("**Paper.** Yes, by 0.1\\nnats.\\n\\nMore.", "Paper")
  'Yes, by 0.1 nats.'
  """
  found = re.search(rf"\*\*{name}\b[^*]*\*\*(.+?)(\n\s*\n|\Z)", text, re.DOTALL)
  return " ".join(found[1].split()) if found else ""


def _said(text: str) -> tuple[str, str]:
  """What was found and at which commit, of a README without a sweep.

  The commit is the last word of **Runs.** N, at COMMIT.
  """
  runs, _, commit = paragraph(text, "Runs").rstrip(".").partition(", at ")
  return paragraph(text, "Ours").rstrip(".") or runs, commit


def _measured(place: pathlib.Path) -> tuple[str, str]:
  """Means of the arms that there are now, seeds of each, and their commits."""
  asked = experiment.load(place)
  lines = compare.whole(compare.of_arms(asked)[0])
  if not lines:
    return "", ""
  means = [_means(asked, metric) for metric in asked.metrics[:METRICS]]
  of_all = [line for found in lines.values() for line in found]
  commits = sorted({_commit(line) for line in of_all})
  counted = _counted([len(found) for found in lines.values()], len(asked.arms))
  return f"{'; '.join(means)} ({counted})", ", ".join(commits)


def _means(asked: experiment.Experiment, metric: str) -> str:
  """A metric of the baseline and of as many of the other arms as have room."""
  _, first, _, rows, _ = compare.compare(asked, metric)
  rows = sorted(rows, key=lambda row: row.name != first)
  most = max(len(row.values) for row in rows)
  parts = [f"{row.name} {_mean(row, first, most)}" for row in rows[:ARMS]]
  more = ["..."] * (len(rows) > ARMS)
  return f"{metric}: {', '.join(parts + more)}"


def _commit(line: results.Line) -> str:
  """With a + where the code was not all committed."""
  return line.get("commit", "")[:7] + "+" * bool(line.get("dirty"))


def _mean(row: compare.Row, first: str, most: int) -> str:
  """Of an arm with fewer seeds than `most` its distance to `first` on those."""
  n = len(row.values)
  if n == most:
    return f"{row.mean:.3f}"
  if not row.differences:
    return f"{row.mean:.3f} at n = {n}" if n else "none"
  pairs = row.differences.values()
  return f"{statistics.fmean(pairs):+.3f} to {first} at n = {len(pairs)}"


def _counted(seeds: Sequence[int], n_arms: int) -> str:
  unless = ", unless said" if min(seeds) < max(seeds) else ""
  text = f"n = {max(seeds)}{unless}"
  if len(seeds) < n_arms:
    return f"{text}; {len(seeds)} of {n_arms} arms"
  return text + f"; {n_arms} arms" * (n_arms > ARMS)


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


def _moved(text: str, folder: str) -> str:
  """Links of a file in `folder`, as they are from beside it.

  >>> _moved("[a](../a/README.md), [b](b.png), [c](https://c)", "q")
  '[a](a/README.md), [b](q/b.png), [c](https://c)'
  """
  beside = lambda link: posixpath.normpath(posixpath.join(folder, link[1]))
  return _LINK.sub(lambda link: f"]({beside(link)})", text)


def write(folder: pathlib.Path) -> pathlib.Path:
  """Puts the table into `folder`/README.md, between its marks."""
  path = folder / "README.md"
  if not path.is_file():
    path.write_text(f"# Experiments\n\n{table.BEGIN}\n{table.END}\n")
  if not table.into_readme(path, index(folder)):
    raise ConfigError(f"{path}: found no line {table.BEGIN}, wanted it")
  return path
