import itertools
import threading
import time

import pytest

from dsv3.data.prefetch import prefetch


def threads():
  return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_items_come_in_order_and_the_thread_ends():
  assert list(prefetch(range(100))) == list(range(100))
  assert not threads()


def test_items_are_made_ahead_but_not_more_than_asked_for():
  made = []
  items = prefetch((made.append(i) or i for i in itertools.count()), depth=3)
  assert next(items) == 0
  deadline = time.monotonic() + 5
  while len(made) < 5 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  # One taken, three ready, one in the thread's hands.
  assert len(made) == 5
  items.close()
  assert not threads()


def test_exceptions_come_where_the_item_would_have():
  def broken():
    yield 1
    raise KeyError("lost")

  items = prefetch(broken())
  assert next(items) == 1
  with pytest.raises(KeyError, match="lost"):
    next(items)
  assert not threads()
