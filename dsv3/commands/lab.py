"""`dsv3 sweep` and `dsv3 compare`: run what a question asks, read the answer."""

import argparse
import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Container, Iterator, Sequence

import jax

from dsv3.config import ConfigError
from dsv3.eval import heatmap
from dsv3.lab import compare as comparing
from dsv3.lab import (
  curves,
  experiment,
  index,
  local,
  page,
  plots,
  process,
  ray_cluster,
  results,
  slurm,
  table,
)
from dsv3.lab.board import Board


def sweep(arguments: argparse.Namespace) -> int:
  """Runs what has no result yet; 1 if a run failed, 128 + n after signal n."""
  # Counts parameters, no more: the accelerator is for the runs.
  jax.config.update("jax_platforms", "cpu")
  asked = _experiment(arguments)
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
      return _conclude(asked) or code
  return code


def _conclude(asked: experiment.Experiment) -> int:
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


def compare(arguments: argparse.Namespace) -> None:
  """Says which arms differ; writes pictures, page and the README's table.

  Of the folder of all experiments: the table of their verdicts.
  """
  folder = pathlib.Path(arguments.folder)
  if not (folder / "sweep.py").exists() and list(folder.glob("*/sweep.py")):
    print(f"{index.write(folder)}: the table of all experiments")
    return
  heatmap.figure_class()  # a missing package is told before the work
  asked = _experiment(arguments)
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


def _experiment(arguments: argparse.Namespace) -> experiment.Experiment:
  return experiment.load(arguments.folder, arguments.seeds, arguments.overrides)


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
  asked: experiment.Experiment, index: int | None, only: Sequence[str]
) -> Sequence[experiment.Run]:
  """Those that --index or --only ask for."""
  if index is not None and only:
    raise ConfigError("--index: found beside --only, wanted one of them")
  names = lambda run: {run.name, str(run), f"{run.id}-s{run.seed}"}
  known = set().union(*map(names, asked.runs))
  wanted = set(_words_of(only, known))
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


def _words_of(parts: Sequence[str], known: Container[str]) -> Iterator[str]:
  """What was joined with commas, of names that may have commas themselves.

  >>> list(_words_of(["a=1", "b=2", "c"], {"a=1,b=2", "c"}))
  ['a=1,b=2', 'c']
  """
  parts = list(parts)
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
