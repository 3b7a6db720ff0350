"""`dsv3 compare`: which arms of an experiment differ, and the index of all."""

import argparse
import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Sequence

from dsv3.config import ConfigError
from dsv3.eval import heatmap
from dsv3.lab import compare as comparing
from dsv3.lab import curves, experiment, index, page, plots, table


def compare(arguments: argparse.Namespace) -> None:
  """Says which arms differ; writes pictures, page and the README's table.

  Of the folder of all experiments: the table of their verdicts.
  """
  folder = pathlib.Path(arguments.folder)
  if not (folder / "sweep.py").exists() and list(folder.glob("*/sweep.py")):
    print(f"{index.write(folder)}: the table of all experiments")
    return
  heatmap.figure_class()  # a missing package is told before the work
  asked = experiment_of(arguments)
  found = [
    comparing.compare(
      asked, metric, baseline=arguments.baseline, match=arguments.match
    )
    for metric in arguments.metric or asked.metrics
  ]
  answer = functools.partial(
    _answer, asked, found, relative=arguments.relative or asked.relative
  )
  if arguments.out:
    answer(pathlib.Path(arguments.out))
  elif arguments.metric or arguments.baseline or arguments.match:
    # Another question than the experiment's own.
    with tempfile.TemporaryDirectory() as folder:
      answer(pathlib.Path(folder), kept=False)
  else:
    answer(asked.folder)


def conclude(asked: experiment.Experiment) -> int:
  """The answer at the end of a sweep; 1 where a metric is in no result.

  A sweep has taken hours by then: what is found is told all the same.
  """
  found, code = [], 0
  for metric in asked.metrics:
    try:
      found.append(comparing.compare(asked, metric))
    except ConfigError as error:
      print(f"METRICS of {asked.folder / 'sweep.py'}: {error}")
      code = 1
  if found:
    _answer(asked, found, asked.folder, relative=asked.relative)
  return code


def _answer(
  asked, found, out: pathlib.Path, *, relative: bool, kept: bool = True
) -> None:
  """The tables, and the same as files."""
  out.mkdir(parents=True, exist_ok=True)
  lines = comparing.whole(comparing.of_arms(asked)[0])
  if relative:
    found[0].notes.extend(curves.relative_notes(lines, found[0].baseline))
  found[0].notes.extend(_own_notes(asked, lines, out))
  print(table.plain(found), end="\n\n")
  if not kept:
    print("the experiment's own table and pictures stay; others: --out=DIR")
  elif importlib.util.find_spec("matplotlib"):
    _write(asked, found, out, relative=relative)
  else:
    print(
      "no pictures and no page: wanted the package matplotlib: pip install "
      '"dsv3[plot]"'
    )
  readme = asked.folder / "README.md"
  if out == asked.folder and table.into_readme(readme, table.markdown(found)):
    print(f"{readme}: its table is the one above")


def _own_notes(asked, lines, out: pathlib.Path) -> Sequence[str]:
  """What the experiment itself finds in its results.

  Its code may fail on results that it did not expect, and the tables are due.
  """
  if not asked.answer:
    return []
  try:
    return list(asked.answer(lines, out))
  except Exception as error:
    what = f"{type(error).__name__}: {error}"
    return [f"answer() of {asked.folder.name}/sweep.py failed: {what}"]


def _write(asked, found, out: pathlib.Path, *, relative: bool) -> None:
  """Pictures and page; tables of further metrics have theirs in the name."""
  lines, _ = comparing.of_arms(asked)
  drawn = plots.draw_curves(found[0], lines, relative=relative)
  written = plots.save(drawn, out / "curves")
  for i, comparison in enumerate(found):
    metric = comparison.metric.replace("/", "-")
    stem = out / (f"table-{metric}" if i else "table")
    written += plots.save(plots.draw_table(comparison), stem)
  written.append(out / "compare.html")
  text = page.page(asked, found, lines, relative=relative)
  written[-1].write_text(text)
  print(f"{out}: {', '.join(path.name for path in written)}")


def experiment_of(arguments: argparse.Namespace) -> experiment.Experiment:
  return experiment.load(arguments.folder, arguments.seeds, arguments.overrides)
