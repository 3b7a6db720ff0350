"""Document packing: an endless table of rows, read at any place (Sec. 4.1).

An epoch is the documents of a source in random order, each with an end token,
as one string of tokens. It is cut in rows of seq_len + 1 tokens, the last of a
row being the first of the next: every token is predicted once. Rows come in
random order too, or a batch would be pieces of one document. What is left over
at the end of an epoch, less than a row, is not used.

All lengths follow from the index and the seed, so a row is found without
reading what is before it.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsv3.data import fim
from dsv3.data.shards import Corpus
from dsv3.data.tokenizer import Tokenizer


class Layout(NamedTuple):
  """Where everything of an epoch is; documents are numbered as in `ids`."""

  order: np.ndarray  # document at each place
  begin: np.ndarray  # first token of each place, and the end of the last
  in_fim: np.ndarray  # of each document
  n_splits: np.ndarray  # of each document
  row_order: np.ndarray


class Span(NamedTuple):
  """The part [begin, end) of a document, marks and end token counted."""

  document: int  # of the corpus
  begin: int
  end: int
  in_fim: bool
  n_splits: int


class Row(NamedTuple):
  epoch: int
  tokens: np.ndarray  # seq_len + 1
  spans: tuple[Span, ...]


class Packing:
  """The rows of some documents of a corpus, of all epochs one after another.

  Everything hangs on (seed, epoch, document): a row is the same whenever and
  wherever it is asked for.
  """

  def __init__(
    self,
    corpus: Corpus,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: tuple[int, ...],
    fim_rate: float = 0.0,
    split_rate: float = 0.0,
  ):
    """Packs the documents `ids` of `corpus`; `seed` is the run's and more."""
    self.corpus = corpus
    self.ids = ids
    self.n_tokens = int((np.diff(corpus.start)[ids] + 1).sum())
    self._tokenizer = tokenizer
    self._seq_len = seq_len
    self._seed = seed
    self._fim_rate = fim_rate
    self._split_rate = split_rate
    self._first_rows = [0]  # of the epochs known so far, and of the next
    self.layout = functools.lru_cache(maxsize=2)(self._layout)
    self._rewritten = functools.lru_cache(maxsize=64)(self._rewrite)

  def row(self, n: int) -> Row:
    """Row `n`, counted over all epochs."""
    epoch, n = self._locate(n)
    layout = self.layout(epoch)
    begin = int(layout.row_order[n]) * self._seq_len
    spans = tuple(self._spans(layout, begin, begin + self._seq_len + 1))
    parts = [self._document(epoch, span) for span in spans]
    return Row(epoch, np.concatenate(parts).astype(np.int32), spans)

  def n_rows(self, epoch: int) -> int:
    """Rows of an epoch. Epochs differ a little: FIM and splits add tokens."""
    while len(self._first_rows) < epoch + 2:
      layout = self.layout(len(self._first_rows) - 1)
      self._first_rows.append(self._first_rows[-1] + len(layout.row_order))
    return self._first_rows[epoch + 1] - self._first_rows[epoch]

  def epochs(self, rows: int) -> float:
    """Passes over the documents that so many rows make."""
    epoch, n = self._locate(rows)
    return epoch + n / self.n_rows(epoch)

  def _locate(self, n: int) -> tuple[int, int]:
    while self._first_rows[-1] <= n:
      self.n_rows(len(self._first_rows) - 1)
    epoch = int(np.searchsorted(self._first_rows, n, side="right")) - 1
    return epoch, n - self._first_rows[epoch]

  def _layout(self, epoch: int) -> Layout:
    rng = np.random.default_rng((*self._seed, epoch))
    n = len(self.ids)
    length = np.diff(self.corpus.start)[self.ids]
    n_splittable = self.corpus.n_splittable[self.ids]
    order = rng.permutation(n)
    in_fim = rng.random(n) < self._fim_rate
    in_fim &= length >= fim.SHORTEST
    # The random summand makes the share right on average, not just rounded.
    wanted = self._split_rate * n_splittable + rng.random(n)
    n_splits = wanted.astype(np.int64)
    length = length + n_splits + fim.MARKS * in_fim + 1
    begin = np.concatenate([[0], np.cumsum(length[order])])
    n_rows = max(0, int(begin[-1]) - 1) // self._seq_len
    row_order = rng.permutation(n_rows)
    return Layout(order, begin, in_fim, n_splits, row_order)

  def _spans(self, layout: Layout, begin: int, end: int) -> Iterator[Span]:
    first = int(np.searchsorted(layout.begin, begin, side="right")) - 1
    last = int(np.searchsorted(layout.begin, end, side="left"))
    for place in range(first, last):
      i, start = layout.order[place], int(layout.begin[place])
      stop = int(layout.begin[place + 1])
      yield Span(
        int(self.ids[i]),
        max(begin, start) - start,
        min(end, stop) - start,
        bool(layout.in_fim[i]),
        int(layout.n_splits[i]),
      )

  def _document(self, epoch: int, span: Span) -> np.ndarray:
    n, begin, end, in_fim, n_splits = span
    if in_fim or n_splits:
      return self._rewritten(epoch, n, in_fim, n_splits)[begin:end]
    start, stop = self.corpus.start[n : n + 2]
    ids = self.corpus.tokens[start + begin : min(start + end, stop)]
    return ids if start + end <= stop else self._ended(ids)

  def _rewrite(self, epoch: int, n: int, in_fim: bool, n_splits: int):
    ids = self.corpus.tokens[slice(*self.corpus.start[n : n + 2])]
    rng = np.random.default_rng((*self._seed, epoch, 1 + n))
    if n_splits:
      ids = fim.split_merged(ids, self._tokenizer.splits, n_splits, rng)
    if in_fim:
      ids = fim.fill_in_the_middle(ids, self._tokenizer.fim, rng)
    return self._ended(ids)

  def _ended(self, ids: np.ndarray) -> np.ndarray:
    return np.append(ids, ids.dtype.type(self._tokenizer.eos_id))
