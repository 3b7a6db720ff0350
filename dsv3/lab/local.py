"""Runs of a sweep that a launcher waits for: so many at once, one progress table.

`Launcher` starts them and hears signals; `Local` has them on this machine.
"""

import collections
import contextlib
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from dsv3.lab import results
from dsv3.lab.board import Board
from dsv3.lab.experiment import Experiment, Run
from dsv3.lab.process import Process, claim

POLL_SECONDS = 0.2


def left(
  sweep: Experiment, runs: Sequence[Run], *, retry: bool
) -> tuple[list[Run], dict[Run, str]]:
  """Runs without a result, and what the results say of the others."""
  lines = results.read(sweep.results)
  known = {}
  for run in runs:
    line = lines.get(run.key)
    if line and not (retry and line["error"]):
      known[run] = line["error"] or "done"
  return [run for run in runs if run not in known], known


class Task(Protocol):
  """A run that is being trained."""

  run: Run
  workdir: pathlib.Path

  @property
  def is_over(self) -> bool: ...

  def ask_to_stop(self, times: int) -> None:
    """The first time to save and stop, then to stop at once."""

  def settle(self) -> dict[str, Any] | None:
    """Its line in the results; None where it was stopped and can go on."""


class Launcher:
  """Trains runs; one that fails does not stop the others."""

  def __init__(
    self,
    sweep: Experiment,
    folder: pathlib.Path,
    board: Board,
    *,
    jobs: int = 1,
    retry: bool = False,
  ):
    self.sweep, self.folder, self.board = sweep, folder, board
    self.jobs, self.retry = jobs, retry
    self.signum: int | None = None  # the first signal that came
    self._asked = 0  # how often to stop
    self._running: list[Task] = []

  def begin(self, run: Run) -> Task | None:
    """Starts a run; None where there is nothing to do, and the board knows."""
    raise NotImplementedError

  def run(self, runs: Sequence[Run]) -> None:
    """Returns when all have ended, or those at work after a signal."""
    waiting = collections.deque(runs)
    with self._signals():
      while self._running or (waiting and not self.signum):
        while waiting and len(self._running) < self.jobs and not self.signum:
          if task := self.begin(waiting.popleft()):
            self._running.append(task)
            self.board.started(task.run, task.workdir)
        for task in self._running:
          task.ask_to_stop(self._asked)
        for task in [t for t in self._running if t.is_over]:
          self._running.remove(task)
          self.board.ended(task.run, task.settle())
        self.board.refresh()
        time.sleep(POLL_SECONDS)

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    """The first asks the runs to save and stop; a second Ctrl-C stops at once."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # What is ignored stays so: under nohup the end of a terminal is no reason.
    heard = [s for s in names if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, self._catch) for s in heard}
    try:
      yield
    finally:
      for signum, handler in before.items():
        signal.signal(signum, handler)

  def _catch(self, signum: int, frame) -> None:
    # No more here: a run may be about to start.
    self.signum, self._asked = self.signum or signum, self._asked + 1


class Local(Launcher):
  """Each run in a process of its own, `jobs` at once."""

  def begin(self, run: Run) -> Process | None:
    held = claim(run, self.folder)
    if held is None:
      self.board.elsewhere(run)
      return None
    # It may have ended elsewhere since the results were read.
    _, known = left(self.sweep, [run], retry=self.retry)
    if known:
      held.close()
      self.board.known(run, known[run])
      return None
    return Process(self.sweep, run, self.folder, held, self.jobs)
