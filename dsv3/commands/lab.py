"""`dsv3 sweep` and `dsv3 compare`: run what a question asks, read the answer."""

import argparse
import pathlib

import jax

from dsv3.config import ConfigError
from dsv3.lab import experiment, local
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
  return _tell(asked, board, launcher.signum)


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
