"""In which order rows of several sources come.

An order says of any row of the run which row of which source it is, without
going through those before it.
"""

import functools
from collections.abc import Sequence

import numpy as np

BLOCK = 1024  # rows in which every source has its exact share


class Mixture:
  """Endless: sources by weight, exact in every block of 1024 rows.

  Weights are rounded to whole rows of a block, at least one a source; within a
  block the sources are in random order.
  """

  def __init__(self, weights: Sequence[float], seed: int):
    self.counts = apportion(weights, BLOCK)
    self._seed = seed
    self._block = functools.lru_cache(maxsize=8)(self._make_block)

  def locate(self, row: int) -> tuple[int, int]:
    """The source of a row of the run, and which of its rows it is."""
    block, at = divmod(row, BLOCK)
    sources, ranks = self._block(block)
    source = int(sources[at])
    return source, block * int(self.counts[source]) + int(ranks[at])

  def n_of(self, source: int, rows: int) -> int:
    """How many of the first `rows` rows are the source's."""
    block, at = divmod(rows, BLOCK)
    sources, _ = self._block(block)
    inside = int((sources[:at] == source).sum())
    return block * int(self.counts[source]) + inside

  def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    # Sources draw from (seed, source, ...); their number is below any BLOCK.
    rng = np.random.default_rng((self._seed, BLOCK, block))
    sources = np.repeat(np.arange(len(self.counts)), self.counts)
    sources = rng.permutation(sources)
    ranks = np.empty(BLOCK, np.int64)
    for source, count in enumerate(self.counts):
      ranks[sources == source] = np.arange(count)
    return sources, ranks


class Once:
  """Every row of every source once, in one fixed random order."""

  def __init__(self, n_rows: Sequence[int]):
    self.counts = np.array(n_rows)
    self._ends = np.cumsum(n_rows)
    self._order = np.random.default_rng(0).permutation(int(self._ends[-1]))

  def __len__(self) -> int:
    return len(self._order)

  def locate(self, row: int) -> tuple[int, int]:
    """The source of a row, and which of its rows it is."""
    at = int(self._order[row])
    source = int(np.searchsorted(self._ends, at, side="right"))
    return source, at - int(self._ends[source] - self.counts[source])

  def n_of(self, source: int, rows: int) -> int:
    """How many of the first `rows` rows are the source's."""
    end = self._ends[source]
    ours = self._order[:rows] < end
    ours &= self._order[:rows] >= end - self.counts[source]
    return int(ours.sum())


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
  """`total` in whole parts as near to the weights as can be, none of them 0.

  >>> apportion([3.0, 1.0], 8)
  array([6, 2])
  """
  exact = np.array(weights, np.float64) / np.sum(weights) * total
  parts = np.ones(len(weights), np.int64)
  for _ in range(total - len(weights)):
    parts[np.argmax(exact - parts)] += 1
  return parts
