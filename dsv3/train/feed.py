"""The rows of every step, and the held-out ones, as the step takes them."""

from collections.abc import Callable, Iterator, Sequence

from dsv3.data import batches
from dsv3.train.schedule import Schedule
from dsv3.train.step import Batch


def training(
  source: batches.Batches,
  schedule: Schedule,
  done: int,
  ahead: int,
  share: Callable[[int], Sequence[int]] = lambda size: (0, size),
) -> Iterator[Batch]:
  """The batches of all steps after the first `done`.

  `ahead` is how many sequences more have been read than the schedule says, for
  a run whose schedule has changed: it goes on from the first one not yet read.
  Of a batch of `size` rows come those from the first to the second of share(size).
  """
  for step in range(done, schedule.steps):
    first = schedule.first_sequence(step) + ahead
    start, stop, *_ = share(schedule.batch_size(step))
    yield Batch(*source.rows(first + start, stop - start))


def heldout(
  source: batches.Batches, batch_size: int, n_batches: int
) -> Iterator[Batch]:
  """The first `n_batches` of the held-out text, the same in every run.

  Fewer where there is no more text; the last may end in padding.
  """
  for i in range(min(n_batches, -(-source.n_rows // batch_size))):
    yield Batch(*source.rows(i * batch_size, batch_size))
