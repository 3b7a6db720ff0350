"""Files that say which processes of a run are there, and a program that tells it.

Of the standard library alone: run as a program, this file is up at once, and outlives
a process that is ended in the middle of a word. JAX ends those whose first process,
the coordinator, is gone: by abort, from a thread of its own, calling it the leader task.
"""

import contextlib
import fcntl
import pathlib
import signal
import subprocess
import sys
import time
from typing import IO

CLOSED = "ended with the others"
AGAIN = "the same command goes on from the newest checkpoint"
_AFTER = "ended after "
_AND = " and "
_SECONDS = 5  # for the system to free the lock of a process that has gone


def hold(file: IO) -> bool:
  """Takes the lock of an open file; False where another process has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def last_words(path: pathlib.Path) -> str | None:
  """What the file of a process says that is gone; None while it is there.

  Raises OSError where the file or its lock cannot be had.
  """
  with open(path, "r+") as file:  # NFS locks what is open for writing alone
    return file.read() if hold(file) else None


def write(file: IO, text: str) -> None:
  """In place of what the file says."""
  file.truncate(0)
  file.write(text)
  file.flush()


def after(names: list[str]) -> str:
  """The last words of a process that ends after others."""
  return _AFTER + _AND.join(names)


def gone(i: int, words: str | None) -> tuple[list[str], bool]:
  """Who has ended of itself, by the last words of process `i`: it or others.

  The second value says that it was others.

  >>> gone(2, "host, pid 7")
  (['process 2 (host, pid 7)'], False)
  >>> gone(0, after(["process 2 (host, pid 7)"]))
  (['process 2 (host, pid 7)'], True)
  >>> gone(0, None), gone(0, CLOSED)
  (([], False), ([], False))
  """
  if words is None or words == CLOSED:
    return [], False
  if words.startswith(_AFTER):
    return words.removeprefix(_AFTER).split(_AND), True
  return [f"process {i} ({words})"], False


def ended(names: list[str], reason: str) -> str:
  """What a process says that cannot go on without others."""
  return f"{', '.join(names)} of the run ended without the others ({reason})"


class Teller:
  """A program that tells who is gone if this process ends without a word."""

  def __init__(self, first: pathlib.Path):
    """Of the file of the first process, which the others cannot go on without."""
    self._program = subprocess.Popen(
      [sys.executable, "-I", "-S", __file__, str(first)], stdin=subprocess.PIPE
    )

  def dismiss(self) -> None:
    """It has nothing to tell: this process tells it itself, or ends well."""
    with contextlib.suppress(OSError, ValueError):  # it has gone, or knows
      self._program.stdin.write(b".")
      self._program.stdin.close()


def main(first: pathlib.Path) -> None:
  """Waits for the end of the process that has started this one."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # those are for that process
  if sys.stdin.buffer.read():
    return
  deadline = time.monotonic() + _SECONDS
  while time.monotonic() < deadline:
    try:
      words = last_words(first)
    except OSError:
      return
    if names := gone(0, words)[0]:
      text = ended(names, "JAX has ended this one")
      print(f"dsv3: error: {text}; {AGAIN}", file=sys.stderr, flush=True)
    if words is not None:
      return
    time.sleep(0.1)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
