"""The rows of every step, and the held-out ones, as the step takes them."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsv3.data import batches
from dsv3.train.schedule import Schedule
from dsv3.train.step import Batch


def training(
  source: batches.Batches,
  schedule: Schedule,
  done: int,
  ahead: int,
  share: Callable[[int], Sequence[range]] = lambda size: (range(size),),
) -> Iterator[Batch]:
  """The batches of all steps after the first `done`.

  `ahead` is how many sequences more have been read than the schedule says, for
  a run whose schedule has changed: it goes on from the first one not yet read.
  Of a batch of `size` rows come those of share(size).
  """
  for step in range(done, schedule.steps):
    first = schedule.first_sequence(step) + ahead
    runs = share(schedule.batch_size(step))
    parts = [source.rows(first + run.start, len(run)) for run in runs]
    yield Batch(*map(np.concatenate, zip(*parts)))


def heldout(
  source: batches.Batches, batch_size: int, n_batches: int
) -> Iterator[Batch]:
  """The first `n_batches` of the held-out text, the same in every run.

  Fewer where there is no more text; the last may end in padding.
  """
  for i in range(min(n_batches, -(-source.n_rows // batch_size))):
    yield Batch(*source.rows(i * batch_size, batch_size))
