"""`dsv3 sweep`: runs what an experiment has no result of yet."""

import argparse
import pathlib
from collections.abc import Container, Iterator, Sequence

import jax

from dsv3.commands.compare import conclude, experiment_of
from dsv3.config import ConfigError
from dsv3.lab import experiment, local, process, ray_cluster, results, slurm
from dsv3.lab.board import Board


def sweep(arguments: argparse.Namespace) -> int:
  """Runs what has no result yet; 1 if a run failed, 128 + n after signal n."""
  # Counts parameters, no more: the accelerator is for the runs.
  jax.config.update("jax_platforms", "cpu")
  asked = experiment_of(arguments)
  runs = _chosen(asked, arguments.index, arguments.only)
  waiting, known = local.left(asked, runs, retry=arguments.retry)
  if arguments.list:
    _list(asked, runs, known)
    return 0
  folder = pathlib.Path(arguments.runs or f"runs/{asked.name}")
  if arguments.launcher == "slurm":
    return _submit(arguments, asked, waiting, folder)
  with Board(runs, known) as board:
    place = asked, folder, board
    launcher = _launcher(arguments, place, len(waiting))
    launcher.run(waiting)
  code = _tell(asked, board, launcher.signum)
  if _is_last(asked, board, waiting):
    with process.alone(folder):  # another may have ended as well
      return conclude(asked) or code
  return code


def _is_last(asked: experiment.Experiment, board: Board, waiting) -> bool:
  """Whether all runs of the experiment have ended, and the last ones here.

  Of some runs that had all ended before there is nothing new to be told.
  """
  lines = results.read(asked.results)
  kept = {run for run in asked.runs if run.key in lines}
  here = {run for run, s in board.state.items() if s in ("done", "failed")}
  if len(kept | here) < len(asked.runs) or all(
    lines[run.key]["error"] for run in kept
  ):
    return False
  return not here.isdisjoint(waiting) or len(here) == len(asked.runs)


def _launcher(arguments, place, n_waiting: int) -> local.Launcher:
  """What trains the runs while this command waits."""
  retry = arguments.retry
  if arguments.launcher == "local":
    return local.Local(*place, jobs=arguments.jobs or 1, retry=retry)
  return ray_cluster.Ray(
    *place,
    jobs=arguments.jobs or max(n_waiting, 1),
    command=lambda run: process.of_one(_words(arguments, place[1]), run),
    options=arguments.ray,
    retry=retry,
  )


def _words(arguments, folder: pathlib.Path) -> list[str]:
  """Of `dsv3 sweep` on another machine."""
  words = [arguments.folder, f"--runs={folder}"]
  words += [f"--seeds={arguments.seeds}"] if arguments.seeds else []
  words += ["--retry"] if arguments.retry else []
  return words + [f"--config.{override}" for override in arguments.overrides]


def _submit(arguments, asked, waiting, folder: pathlib.Path) -> int:
  """Hands the runs to Slurm and does not wait for them."""
  words = _words(arguments, folder)
  if not waiting:
    print(f"{asked.results}: nothing is left to run")
    return 0
  at_once = arguments.jobs or len(waiting)
  jobs = slurm.submit(
    [process.of_one(words, run) for run in waiting],
    folder / "slurm",
    name=f"dsv3-{asked.name}",
    at_once=at_once,
    parameters=arguments.slurm,
  )
  for run, job in zip(waiting, jobs):
    print(f"{job.job_id}  {run}")
  print(
    f"{len(jobs)} jobs, {at_once} at once; logs in {folder / 'slurm'}; "
    f"dsv3 sweep {arguments.folder} --list says what has ended; the last to end "
    "writes table and page"
  )
  return 0


def _chosen(
  asked: experiment.Experiment, index: int | None, only: str
) -> Sequence[experiment.Run]:
  """Those that --index or --only ask for."""
  if index is not None and only:
    raise ConfigError("--index: found beside --only, wanted one of them")
  names = lambda run: {run.name, str(run), f"{run.id}-s{run.seed}"}
  known = set().union(*map(names, asked.runs))
  wanted = set(_named(only, known))
  if strange := sorted(wanted - known):
    raise ConfigError(
      f"--only: found {strange[0]}, wanted an arm ({', '.join(asked.arms)}) or "
      "a run of --list"
    )
  if index is None:
    return [run for run in asked.runs if not only or names(run) & wanted]
  if index >= len(asked.runs):
    raise ConfigError(
      f"--index: found {index}, wanted 0 to {len(asked.runs) - 1}: "
      f"{asked.folder} has {len(asked.runs)} runs"
    )
  return asked.runs[index : index + 1]


def _named(text: str, known: Container[str]) -> Iterator[str]:
  """What is joined with commas in `text`, of names that may have commas too.

  >>> list(_named("a=1,b=2,c", {"a=1,b=2", "c"}))
  ['a=1,b=2', 'c']
  """
  parts = text.split(",") if text else []
  while parts:
    lengths = range(len(parts), 0, -1)
    n = next((n for n in lengths if ",".join(parts[:n]) in known), 1)
    yield ",".join(parts[:n])
    del parts[:n]


def _list(asked: experiment.Experiment, runs, known) -> None:
  """`runs` with their number for --index, their state and their diff."""
  width = max(len(str(run)) for run in runs)
  print(f"{asked.folder}: {len(asked.runs)} runs, diffs of {asked.base}")
  for i, run in enumerate(asked.runs):
    if run not in runs:
      continue
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
