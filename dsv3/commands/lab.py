"""`dsv3 sweep` and `dsv3 compare`: run what a question asks, read the answer."""

import argparse
import importlib.util
import pathlib

import jax

from dsv3.config import ConfigError
from dsv3.eval import heatmap
from dsv3.lab import compare as comparing
from dsv3.lab import curves, experiment, local, page, plots, table
from dsv3.lab.board import Board


def sweep(arguments: argparse.Namespace) -> int:
  """Runs what has no result yet; 1 if a run failed, 128 + n after signal n."""
  # Counts parameters, no more: the accelerator is for the runs.
  jax.config.update("jax_platforms", "cpu")
  asked = _experiment(arguments)
  runs = _chosen(asked, arguments.index)
  waiting, known = local.left(asked, runs, retry=arguments.retry)
  if arguments.list:
    _list(asked, known)
    return 0
  folder = pathlib.Path(arguments.runs or f"runs/{asked.name}")
  with Board(runs, known) as board:
    launcher = local.Local(
      asked, folder, board, jobs=arguments.jobs, retry=arguments.retry
    )
    launcher.run(waiting)
  code = _tell(asked, board, launcher.signum)
  if arguments.index is None and board.count("done") == len(runs):
    found = [comparing.compare(asked, metric) for metric in asked.metrics]
    _answer(asked, found, asked.folder, relative=False)
  return code


def compare(arguments: argparse.Namespace) -> None:
  """Says which arms differ; writes pictures, page and the README's table."""
  heatmap.figure_class()  # a missing package is told before the work
  asked = _experiment(arguments)
  found = [
    comparing.compare(
      asked, metric, baseline=arguments.baseline, match=arguments.match
    )
    for metric in arguments.metric or asked.metrics
  ]
  if arguments.relative:
    lines = comparing.whole(comparing.of_arms(asked)[0])
    notes = curves.relative_notes(lines, found[0].baseline)
    found[0].notes.extend(notes)
  out = pathlib.Path(arguments.out or asked.folder)
  _answer(asked, found, out, relative=arguments.relative)


def _answer(asked, found, out: pathlib.Path, *, relative: bool) -> None:
  """The tables, and the same as files."""
  print(table.plain(found), end="\n\n")
  if importlib.util.find_spec("matplotlib"):
    _write(asked, found, out, relative=relative)
  readme = asked.folder / "README.md"
  if out == asked.folder and table.into_readme(readme, table.markdown(found)):
    print(f"{readme}: its table is the one above")


def _write(asked, found, out: pathlib.Path, *, relative: bool) -> None:
  """Pictures and page."""
  out.mkdir(parents=True, exist_ok=True)
  lines, _ = comparing.of_arms(asked)
  drawn = plots.draw_curves(found[0], lines, relative=relative)
  written = plots.save(drawn, out / "curves")
  written += plots.save(plots.draw_table(found[0]), out / "table")
  written.append(out / "compare.html")
  text = page.page(asked, found, lines, relative=relative)
  written[-1].write_text(text)
  print(f"{out}: {', '.join(path.name for path in written)}")


def _experiment(arguments: argparse.Namespace) -> experiment.Experiment:
  seeds = range(arguments.seeds) if arguments.seeds else None
  return experiment.load(arguments.folder, seeds, arguments.overrides)


def _chosen(asked: experiment.Experiment, index: int | None):
  if index is None:
    return asked.runs
  if index >= len(asked.runs):
    raise ConfigError(
      f"--index: found {index}, wanted 0 to {len(asked.runs) - 1}: "
      f"{asked.folder} has {len(asked.runs)} runs"
    )
  return asked.runs[index : index + 1]


def _list(asked: experiment.Experiment, known) -> None:
  """The runs, their number for --index, their state and their diff."""
  width = max(len(str(run)) for run in asked.runs)
  print(f"{asked.folder}: {len(asked.runs)} runs, diffs of {asked.base}")
  for i, run in enumerate(asked.runs):
    state = known.get(run, "to run")
    state = state if state in ("done", "to run") else "failed"
    diff = " ".join(f"{key}={value}" for key, value in run.diff.items())
    print(f"{i:>4}  {run!s:<{width}}  {state:<7}  {diff}".rstrip())


def _tell(
  asked: experiment.Experiment, board: Board, signum: int | None
) -> int:
  counts = {s: board.count(s) for s in board.state.values()}
  print(
    f"{asked.results}: "
    + ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
  )
  if counts.get("failed"):
    print("runs that have failed are tried again with --retry")
  if signum:
    print("stopped; the same command goes on where it was")
    return 128 + signum
  return 1 if counts.get("failed") else 0
