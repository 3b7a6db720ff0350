"""Who of a run's processes is there, and what the others do without one.

A collective whose partner is gone fails at once on some networks and waits for ever
on others, and so does whatever else the processes wait for together.
"""

import contextlib
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import IO

import jax

from dsv3.errors import TOLD
from dsv3.parallel import locks, processes

GRACE_SECONDS = 5  # for the error of a collective to come, and to be told
LOCK_SECONDS = 60  # for the system to free the locks of a run that was killed
_LOOK_SECONDS = 1


class Presence:
  """A locked file of each process in the run folder.

  The system frees the lock of a process that is killed. Alone, a process has no
  file. All make one together, and from there on each ends soon after another, or
  after an error of `trouble`: of that no caller is told while all wait for each
  other. The first process looks at all the others and they at the first: one that
  ends after another writes down after whom. Without the first JAX may end them before
  they have looked; then a `locks.Teller` tells it.
  """

  def __init__(self, workdir: str | pathlib.Path):
    self._folder = pathlib.Path(workdir) / "processes"
    self._mine: IO | None = None
    self._teller: locks.Teller | None = None
    self._closed = threading.Event()
    self._blind = False  # locks do not reach other hosts
    self._told_blind = False
    self.trouble: Callable[[], BaseException | None] = lambda: None
    if jax.process_count() > 1:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._mine = open(self._folder / str(jax.process_index()), "a+")
      self._lock()
      locks.write(self._mine, f"{socket.gethostname()}, pid {os.getpid()}")
      try:
        self._meet()
      except Exception as error:  # one has gone meanwhile
        self.leave(error)

  def _meet(self) -> None:
    """All make their files, and then look whether they see each other's."""
    processes.wait_for_all("present")
    if gone := self._gone(self._watched())[0]:  # though all are there
      self._tell_blind(f"the lock of {gone[0]} is not seen on this host")
      self._blind = True
    elif jax.process_index():
      self._teller = locks.Teller(self._folder / "0")
    threading.Thread(target=self._look, daemon=True).start()
    processes.wait_for_all("seen")  # nobody has ended before all have looked

  def _lock(self) -> None:
    """Takes this process's file, which one that was killed may hold for a while."""
    deadline = time.monotonic() + LOCK_SECONDS
    while not locks.hold(self._mine):
      if time.monotonic() > deadline:
        self._mine.seek(0)
        text = f"another run is in {self._folder.parent} ({self._mine.read()})"
        self._end(text)
      time.sleep(0.5)

  def gone(self) -> list[str]:
    """Processes that have ended of themselves, as `process 1 (host, pid 7)`."""
    return self._gone(range(jax.process_count()))[0]

  def _gone(self, some: Iterable[int]) -> tuple[list[str], bool]:
    """Those of some, or after whom these have ended; has one ended after another?"""
    found, followed = {}, False
    for i in some if self._mine and not self._blind else ():
      words = None if i == jax.process_index() else self._last_words(i)
      names, others = locks.gone(i, words)
      found |= dict.fromkeys(names)
      followed = followed or others
    return list(found), followed

  def _last_words(self, i: int) -> str | None:
    """What the file of a process says that is gone; None while it is there."""
    try:
      return locks.last_words(self._folder / str(i))
    except OSError as error:
      self._tell_blind(str(error))
      return None

  def _tell_blind(self, reason: str) -> None:
    if not self._told_blind:
      self._told_blind = True
      text = f"processes that end cannot be seen in the run folder ({reason})"
      print(f"dsv3: {text}", file=sys.stderr, flush=True)

  def leave(self, error: BaseException) -> None:
    """Ends this process of several with an error; alone it returns.

    The error may be of others that are gone. To clean up would wait for those that
    are not, who find this process gone.
    """
    if not self._mine:
      return
    deadline = time.monotonic() + 2  # an error may come before a lock is free
    while time.monotonic() < deadline:
      if gone := self.gone():
        self._follow(gone, _line(error))
      time.sleep(0.1)
    if not isinstance(error, (*TOLD, KeyboardInterrupt)):
      traceback.print_exception(error)
    self._end(_line(error))

  def close(self) -> None:
    """Ends with the others: nobody is to follow."""
    self._closed.set()
    if self._mine:
      locks.write(self._mine, locks.CLOSED)
      self._mine.close()
    if self._teller:
      self._teller.dismiss()

  def _watched(self) -> Iterable[int]:
    return [0] if jax.process_index() else range(1, jax.process_count())

  def _look(self) -> None:
    watched, since = self._watched(), None
    while not self._closed.wait(_LOOK_SECONDS):
      (gone, followed), error = self._gone(watched), self.trouble()
      since = (since or time.monotonic()) if gone or error else None
      if since is None:
        continue
      if not followed and time.monotonic() - since < GRACE_SECONDS:
        continue
      if error:  # the others will find this process gone
        self._end(f"a checkpoint could not be written ({_line(error)})")
      self._follow(gone, "what was waited for with it cannot come")

  def _follow(self, gone: list[str], reason: str) -> None:
    with contextlib.suppress(
      OSError
    ):  # a full disk; the others see it themselves
      locks.write(self._mine, locks.after(gone))
    self._end(locks.ended(gone, reason))

  def _end(self, text: str) -> None:
    """At once: what waits for the others at the end of a program hangs."""
    try:
      print(f"dsv3: error: {text}; {locks.AGAIN}", file=sys.stderr, flush=True)
    finally:  # though it cannot be told, on a full disk
      if self._teller:
        self._teller.dismiss()
      os._exit(1)


def _line(error: BaseException) -> str:
  return str(error).strip().split("\n")[0][:120] or type(error).__name__
