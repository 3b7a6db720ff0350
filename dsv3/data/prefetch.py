"""Batches made while the device works."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
  """The same items, up to `depth` of them made ahead by a thread.

  An exception of the iterable is raised where the item would have come.
  Closing the generator stops the thread and waits for it.
  """
  ready: queue.Queue = queue.Queue(depth)
  stopped = threading.Event()

  def put(item, error=None) -> bool:
    while not stopped.is_set():
      try:
        ready.put((item, error), timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work():
    try:
      for item in items:
        if not put(item):
          return
      put(_END)
    except BaseException as error:  # handed over, not swallowed
      put(_END, error)

  thread = threading.Thread(target=work, name="prefetch", daemon=True)
  thread.start()
  try:
    while True:
      item, error = ready.get()
      if error is not None:
        raise error
      if item is _END:
        return
      yield item
  finally:
    stopped.set()
    thread.join()
