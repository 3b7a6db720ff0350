"""Who of a run's processes is there, and what the others do without one."""

import fcntl
import os
import pathlib
import socket
import sys
import time
from typing import IO

import jax

_FOLLOWED = "ended with the others"


class Presence:
  """Who of a run is there: a locked file of each process in the run folder.

  The system frees the lock of a process that is killed. Alone, a process has no
  file.
  """

  def __init__(self, workdir: pathlib.Path):
    self._folder = pathlib.Path(workdir) / "processes"
    self._mine: IO | None = None
    if jax.process_count() > 1:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._mine = open(self._folder / str(jax.process_index()), "w")
      fcntl.flock(self._mine, fcntl.LOCK_EX)
      self._write(f"{socket.gethostname()}, pid {os.getpid()}")

  def _write(self, text: str) -> None:
    self._mine.seek(0)
    self._mine.truncate()
    self._mine.write(text)
    self._mine.flush()

  def gone(self) -> list[str]:
    """Processes that have ended of themselves, as `process 1 (host, pid 7)`."""
    found = []
    for i in range(jax.process_count() if self._mine else 0):
      if i == jax.process_index():
        continue
      with open(self._folder / str(i)) as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          continue
        if (text := file.read()) != _FOLLOWED:
          found.append(f"process {i} ({text})")
    return found

  def follow(self, error: BaseException) -> None:
    """Ends this process if others are gone; returns if none is.

    At once: what waits for the others at the end of a program would not return.
    """
    deadline = (
      time.monotonic() + 2
    )  # the error may come before the lock is free
    while not (gone := self.gone()):
      if not self._mine or time.monotonic() > deadline:
        return
      time.sleep(0.1)
    self._write(_FOLLOWED)
    reason = str(error).strip().split("\n")[0][:120]
    print(
      f"dsv3: error: {', '.join(gone)} of the run ended without the others "
      f"({reason}); the same command goes on from the newest checkpoint",
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)

  def close(self) -> None:
    if self._mine:
      self._write(_FOLLOWED)
      self._mine.close()
