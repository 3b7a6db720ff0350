"""Who of a run's processes is there, and what the others do without one.

A collective whose partner is gone fails at once on some networks and waits for ever
on others, and so does whatever else the processes wait for together.
"""

import contextlib
import fcntl
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
from dsv3.parallel import processes

GRACE_SECONDS = 5  # for the error of a collective to come, and to be told
LOCK_SECONDS = 60  # for the system to free the locks of a run that was killed
_LOOK_SECONDS = 1
_CLOSED = "ended with the others"
_AFTER = "ended after "
_AND = " and "


class Presence:
  """A locked file of each process in the run folder.

  The system frees the lock of a process that is killed. Alone, a process has no
  file. All make one together, and from there on each ends soon after another, or
  after an error of `trouble`: of that no caller is told while all wait for each
  other. The first process looks at all the others and they at the first: one that
  ends after another writes down after whom.
  """

  def __init__(self, workdir: str | pathlib.Path):
    self._folder = pathlib.Path(workdir) / "processes"
    self._mine: IO | None = None
    self._closed = threading.Event()
    self._blind = False  # locks do not reach other hosts
    self._told_blind = False
    self.trouble: Callable[[], BaseException | None] = lambda: None
    if jax.process_count() > 1:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._mine = open(self._folder / str(jax.process_index()), "a+")
      self._lock()
      self._write(f"{socket.gethostname()}, pid {os.getpid()}")
      processes.wait_for_all("present")
      if gone := self._gone(self._watched())[0]:  # though all are there
        self._tell_blind(f"the lock of {gone[0]} is not seen on this host")
        self._blind = True
      processes.wait_for_all("seen")
      threading.Thread(target=self._look, daemon=True).start()

  def _lock(self) -> None:
    """Takes this process's file, which one that was killed may hold for a while."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
      try:
        return fcntl.flock(self._mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if time.monotonic() > deadline:
          self._mine.seek(0)
          _end(f"another run is in {self._folder.parent} ({self._mine.read()})")
      time.sleep(0.5)

  def gone(self) -> list[str]:
    """Processes that have ended of themselves, as `process 1 (host, pid 7)`."""
    return self._gone(range(jax.process_count()))[0]

  def _gone(self, some: Iterable[int]) -> tuple[list[str], bool]:
    """Those of some, or after whom these have ended; has one ended after another?"""
    found, followed = {}, False
    for i in some if self._mine and not self._blind else ():
      text = None if i == jax.process_index() else self._last_words(i)
      if text is None or text == _CLOSED:
        continue
      names = [f"process {i} ({text})"]
      if text.startswith(_AFTER):
        names, followed = text.removeprefix(_AFTER).split(_AND), True
      found |= dict.fromkeys(names)
    return list(found), followed

  def _last_words(self, i: int) -> str | None:
    """What the file of a process says that is gone; None while it is there."""
    try:  # NFS locks what is open for writing alone
      with open(self._folder / str(i), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file.read()
    except BlockingIOError:
      return None
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
    _end(_line(error))

  def close(self) -> None:
    """Ends with the others: nobody is to follow."""
    self._closed.set()
    if self._mine:
      self._write(_CLOSED)
      self._mine.close()

  def _write(self, text: str) -> None:
    self._mine.truncate(0)
    self._mine.write(text)
    self._mine.flush()

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
        _end(f"a checkpoint could not be written ({_line(error)})")
      self._follow(gone, "what was waited for with it cannot come")

  def _follow(self, gone: list[str], reason: str) -> None:
    with contextlib.suppress(
      OSError
    ):  # a full disk; the others see for themselves
      self._write(_AFTER + _AND.join(gone))
    _end(f"{', '.join(gone)} of the run ended without the others ({reason})")


def _line(error: BaseException) -> str:
  return str(error).strip().split("\n")[0][:120] or type(error).__name__


def _end(text: str) -> None:
  """At once: what waits for the others at the end of a program hangs."""
  again = "the same command goes on from the newest checkpoint"
  try:
    print(f"dsv3: error: {text}; {again}", file=sys.stderr, flush=True)
  finally:  # though it cannot be told, on a full disk
    os._exit(1)
