"""A run of a sweep as a process of its own: `dsv3 train` in a folder.

A process can crash, run out of memory or be stopped, and the sweep goes on;
what it did is in its folder, where `dsv3 train` goes on with it.
"""

import contextlib
import datetime
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from dsv3.config import ConfigError
from dsv3.lab import experiment, measure, results, summary
from dsv3.lab.experiment import Experiment, Run
from dsv3.train import run as run_folder

_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def folder_of(run: Run, runs: pathlib.Path) -> pathlib.Path:
  """`NAME-sSEED`, or one with its id where that holds another run.

  A longer run must not go on from a shorter one of its name: its schedule
  would have been another.
  """
  plain = runs / str(run)
  if not (plain / "config.json").exists():
    return plain
  try:
    same = experiment.identity(run_folder.stored_config(plain)) == run.id
  except ConfigError:  # damaged, or of a schema that is gone
    same = False
  return plain if same else runs / f"{run}-{run.id}"


def command(sweep: Experiment, run: Run, workdir: pathlib.Path) -> list[str]:
  """`dsv3 train` of a run, as a user could type it."""
  diff = {"train.max_minutes": 0.0, **run.diff, "train.seed": run.seed}
  words = [sys.executable, "-m", "dsv3", "train", "--no_sample"]
  words += [f"--config={sweep.base}", f"--workdir={workdir}"]
  return words + [f"--config.{key}={_text(v)}" for key, v in diff.items()]


def of_one(words: Sequence[str], run: Run) -> list[str]:
  """`dsv3 sweep` for one run, by what it computes: for another machine."""
  only = f"--only={run.id}-s{run.seed}"
  return [sys.executable, "-m", "dsv3", "sweep", *words, only]


def _text(value: Any) -> str:
  return value if isinstance(value, str) else repr(value)


def claim(run: Run, runs: pathlib.Path) -> IO | None:
  """The right to a run, until it is closed; None where another sweep has it.

  A lock that the process inherits: it is held while either is alive.
  """
  folder = runs / "claims"
  folder.mkdir(parents=True, exist_ok=True)
  file = open(folder / f"{run.id}-s{run.seed}", "w")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  return file


@contextlib.contextmanager
def alone(runs: pathlib.Path) -> Iterator[None]:
  """Waits until no other sweep of these run folders is in here."""
  folder = runs / "claims"
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "answer", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


class Process:
  """A run that is being trained."""

  def __init__(
    self, sweep: Experiment, run: Run, runs: pathlib.Path, held: IO, share: int
  ):
    self.sweep, self.run, self._claim = sweep, run, held
    self.workdir = folder_of(run, runs)
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._asked = 0
    self._started = time.monotonic()
    self._log = open(self.workdir / "log.txt", "ab")
    self._from = self._log.tell()
    self._share = share
    self._next = measure.command(sweep.folder, self.workdir)
    self._process = self._begin(command(sweep, run, self.workdir))

  def _begin(self, words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
      words,
      stdin=subprocess.DEVNULL,
      stdout=self._log,
      stderr=subprocess.STDOUT,
      env=environment(self._share),
      pass_fds=[self._claim.fileno()],
      start_new_session=True,  # Ctrl-C comes once, from the launcher
    )

  @property
  def is_over(self) -> bool:
    code = self._process.poll()
    if code == 0 and self._next and not self._asked:
      self._process, self._next = self._begin(self._next), None
      return False
    return code is not None

  def ask_to_stop(self, times: int) -> None:
    """SIGTERM, which saves; when asked again SIGINT, which does not wait."""
    if times > self._asked and not self.is_over:
      self._process.send_signal(signal.SIGINT if times > 1 else signal.SIGTERM)
      self._asked = times

  def settle(self) -> dict[str, Any] | None:
    """Writes down how it ended; None where it was stopped and can go on."""
    code = self._process.wait()
    self._watched()
    try:
      if _stopped_by(code) or (code == 0 and self._next):
        return None
      line = self._line(code)
      results.append(self.sweep.results, line)
      return line
    finally:
      self._log.close()
      self._claim.close()

  def _line(self, code: int) -> dict[str, Any]:
    run, now = self.run, datetime.datetime.now().astimezone()
    line = {
      "name": run.name,
      "seed": run.seed,
      "id": run.id,
      "base": pathlib.Path(self.sweep.base).stem,
      "diff": run.diff,
      "date": now.isoformat(timespec="seconds"),
      "error": self._error(code) if code else None,
    }
    line |= summary.of_run(run, self.workdir)
    found = [float(text) for text in self._seconds.read_text().split()]
    whole = line.get("starts") == len(found)  # else nobody has watched it all
    return line | {"wall_seconds": round(sum(found), 2) if whole else None}

  @property
  def _seconds(self) -> pathlib.Path:
    return self.workdir / "wall_seconds.txt"

  def _watched(self) -> None:
    """Notes how long this start has run, whether it goes on or not."""
    with open(self._seconds, "a") as file:
      print(f"{time.monotonic() - self._started:.2f}", file=file)

  def _error(self, code: int) -> str:
    """The last line that the run said, or the signal that killed it."""
    if code < 0:
      name = signal.Signals(-code).name
      hint = ": out of memory?" if name == "SIGKILL" else ""
      return f"killed by {name}{hint}"
    with open(self.workdir / "log.txt", "rb") as file:
      file.seek(self._from)
      said = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in said if line.strip()]
    last = said[-1] if said else "said nothing"
    last = last.removeprefix("dsv3: error: ")
    here = f"{pathlib.Path.cwd()}/"  # a path of this machine tells nobody more
    return f"{last.replace(here, '')[:500]} (exit {code})"


def _stopped_by(code: int) -> bool:
  """Whether an exit code is that of a run which was asked to stop."""
  return any(code in (-signum, 128 + signum) for signum in _STOPS)


def on_node(asked: Mapping[str, str]) -> dict[str, str]:
  """The environment of a run on the node that it has been given.

  What the node has set stays: which GPUs are the run's, whose job it is. All else
  is as where the run was `asked` for, with the same dsv3.
  """
  return {**asked, **os.environ, "PYTHONPATH": asked["PYTHONPATH"]}


def environment(share: int) -> dict[str, str]:
  """This process's own, and this dsv3 first; `share` runs fill a GPU."""
  root = str(pathlib.Path(__file__).parents[2])
  paths = [root, os.environ.get("PYTHONPATH", "")]
  out = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
  if share > 1:
    out.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / share:.3f}")
  return out
