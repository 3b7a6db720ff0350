"""The rows of every step, and the held-out ones, as the step takes them."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv3.data import batches
from dsv3.train.layout import Layout
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
    yield _rows(source, first, share(schedule.batch_size(step)))


def _rows(source, first: int, runs: Sequence[range]) -> Batch:
  """Runs of rows, one after the other; row 0 is the source's `first`."""
  parts = [source.rows(first + run.start, len(run)) for run in runs]
  return Batch(*map(np.concatenate, zip(*parts)))


class Heldout(NamedTuple):
  """A batch of held-out text."""

  batch: Batch  # of all processes
  labels_BPL: np.ndarray  # of those rows whose bytes this process counts


def heldout(
  source: batches.Batches,
  batch_size: int,
  n_batches: int,
  layout: Layout | None = None,
) -> Iterator[Heldout]:
  """The first `n_batches` of the held-out text, the same in every run.

  Fewer where there is no more text; the last may end in padding. A process of a
  `layout` reads the rows of its devices.
  """
  for i in range(min(n_batches, -(-source.n_rows // batch_size))):
    if layout is None:
      batch = Batch(*source.rows(i * batch_size, batch_size))
      yield Heldout(batch, batch.labels_BPL)
      continue
    share = layout.share(batch_size)
    batch = _rows(source, i * batch_size, share.runs)
    labels_BPL = batch.labels_BPL if share.counts else batch.labels_BPL[:0]
    yield Heldout(layout.put_rows(batch, batch_size), labels_BPL)
