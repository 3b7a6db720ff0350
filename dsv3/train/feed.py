"""The rows of every step, and the held-out ones, as the step takes them."""

from collections.abc import Iterator

import numpy as np

from dsv3 import config
from dsv3.data import batches
from dsv3.train.schedule import Schedule
from dsv3.train.step import Batch


def training(
  source: batches.Batches, schedule: Schedule, done: int, ahead: int
) -> Iterator[Batch]:
  """The batches of all steps after the first `done`.

  `ahead` is how many sequences more have been read than the schedule says, for
  a run whose schedule has changed: it goes on from the first one not yet read.
  """
  for step in range(done, schedule.steps):
    first = schedule.first_sequence(step) + ahead
    yield Batch(*source.rows(first, schedule.batch_size(step)))


def heldout(values: config.Config, n_batches: int | None = None) -> list[Batch]:
  """The first held-out batches; None: `train.eval_batches` of them.

  Fewer where there is no more text; its last batch may end in padding.
  """
  if n_batches is None:
    n_batches = values.train.eval_batches
  if not n_batches:
    return []
  size = values.schedule.batch_size
  rows = batches.heldout(values, n_batches * size)
  parts = [np.split(x, n_batches) for x in rows]
  made = [Batch(*part) for part in zip(*parts)]
  return [batch for batch in made if (batch.labels_BPL >= 0).any()]
