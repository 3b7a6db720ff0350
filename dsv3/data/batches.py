"""Batches: rows with their labels, by number.

Rows are numbered over the whole run, and step s takes as many as its batch
size from where the step before has ended. A process asks for its own rows, so
the batch of a step is the same on any number of hosts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsv3 import config as schema
from dsv3.config import ConfigError
from dsv3.data import shards, tokenizer
from dsv3.data.mixture import Mixture, Once
from dsv3.data.packing import Packing, Row, Span

NO_LABEL = -1


class Batch(NamedTuple):
  """Some rows, as the model takes them. All int32."""

  tokens_BL: np.ndarray
  labels_BPL: np.ndarray  # token i + p + 1 of the row at [:, p, i], or -1
  segments_BL: np.ndarray  # document within the row, from 1; 0: padding


class SourceReport(NamedTuple):
  """What a source gives to the run."""

  source: str
  documents: int
  tokens: int
  bytes: int  # of text
  share: float  # of the rows
  epochs: float


class RowReport(NamedTuple):
  """What a row is made of."""

  row: int
  source: str
  epoch: int
  spans: tuple[tuple[str, Span], ...]  # each with its document's name
  tokens: np.ndarray  # seq_len + 1: the last is a label only
  text: str


class Batches:
  """The rows of a split of the corpus of a config.

  "train" has no end. "heldout" has each of its `n_rows` rows once, without
  FIM and splits and whatever the seed, so that all runs over a corpus are
  measured on the same text; past them come rows of padding.

  Raises:
    ConfigError: for a source that cannot be read, a split without a row, or
      a tokenizer that does not fit the model or the FIM rate.
  """

  def __init__(self, config: schema.Config, seed: int, split: str = "train"):
    data = config.data
    self.tokenizer = tokenizer.load(data.tokenizer, config.model.vocab_size)
    if not all(weight > 0 for weight in data.weights):
      raise ConfigError(
        f"config.data.weights: found {data.weights}, wanted all above 0"
      )
    self._depth = config.model.mtp.depth
    self._seq_len = data.seq_len
    self._mask_documents = data.mask_documents
    train = split == "train"
    if train and data.fim_rate and not self.tokenizer.fim:
      raise ConfigError(
        f"config.data.fim_rate: found {data.fim_rate}, wanted 0: the tokenizer "
        f"{data.tokenizer} has no FIM tokens"
      )
    corpora = [
      shards.prepare(source, self.tokenizer, data.text_key, data.cache)
      for source in data.sources
    ]
    self.packings = [
      Packing(
        corpus,
        _documents(corpus, data.heldout, train),
        self.tokenizer,
        data.seq_len,
        (seed if train else 0, i),
        data.fim_rate if train else 0.0,
        data.split_rate if train else 0.0,
      )
      for i, corpus in enumerate(corpora)
    ]
    n_rows = [packing.n_rows(0) for packing in self.packings]
    self._check_rows(n_rows, data, train)
    if train:
      weights = data.weights or [p.n_tokens for p in self.packings]
      self._order, self.n_rows = Mixture(weights, seed), None
    else:
      self._order = Once(n_rows)
      self.n_rows = len(self._order)

  def rows(self, first: int, count: int) -> Batch:
    """Rows [first, first + count) of the run."""
    shape = (count, self._seq_len + 1)
    tokens = np.full(shape, self.tokenizer.pad_id, np.int32)
    segments = np.zeros(shape, np.int32)
    for b in range(count):
      if self.n_rows is None or first + b < self.n_rows:
        row = self._row(first + b)[1]
        tokens[b] = row.tokens
        segments[b] = _segments(row.spans) if self._mask_documents else 1
    labels_BPL = labels(tokens, segments, 1 + self._depth)
    return Batch(tokens[:, :-1], labels_BPL, segments[:, :-1])

  def identity(self) -> list[list]:
    """Source, digest of its tokens and documents in this split, of each source.

    What a checkpoint keeps, so that a run or an evaluation over other text
    than before is noticed.
    """
    return [
      [p.corpus.source, p.corpus.digest, len(p.ids)] for p in self.packings
    ]

  def report(self, rows: int) -> list[SourceReport]:
    """What each source gives to the first `rows` rows of the run."""
    shares = self._order.counts / self._order.counts.sum()
    out = []
    for i, packing in enumerate(self.packings):
      n_bytes = int(packing.corpus.n_bytes[packing.ids].sum())
      out.append(
        SourceReport(
          packing.corpus.source,
          len(packing.ids),
          packing.n_tokens,
          n_bytes,
          float(shares[i]),
          packing.epochs(self._order.n_of(i, rows)),
        )
      )
    return out

  def describe(self, first: int, count: int) -> list[RowReport]:
    """The documents and the text of rows, to be looked at."""
    names = [packing.corpus.names() for packing in self.packings]
    out = []
    for n in range(first, first + count):
      i, row = self._row(n)
      source = self.packings[i].corpus.source
      spans = tuple((names[i][span.document], span) for span in row.spans)
      text = self.tokenizer.decode(row.tokens)
      out.append(RowReport(n, source, row.epoch, spans, row.tokens, text))
    return out

  def texts(self) -> Iterator[str]:
    """The documents of the split, decoded."""
    for corpus, ids in ((p.corpus, p.ids) for p in self.packings):
      for i in ids:
        tokens = corpus.tokens[slice(*corpus.start[i : i + 2])]
        yield self.tokenizer.decode(tokens)

  def _row(self, n: int) -> tuple[int, Row]:
    source, row = self._order.locate(n)
    return source, self.packings[source].row(row)

  def _check_rows(self, n_rows: list[int], data: schema.Data, train: bool):
    empty = [s for s, n in zip(data.sources, n_rows) if not n]
    if train and empty:
      raise ConfigError(
        f"config.data.sources: {empty[0]}: found less than a row to train on, "
        f"wanted {data.seq_len + 1} tokens"
      )
    if not train and not sum(n_rows):
      n = sum(len(p.ids) for p in self.packings)
      raise ConfigError(
        f"config.data.heldout: found {data.heldout}, which holds {n} documents "
        f"out, wanted {data.seq_len + 1} tokens of them: raise it"
      )


def labels(tokens: np.ndarray, segments: np.ndarray, n: int) -> np.ndarray:
  """Targets of `n` predictions a position (Eq. 22, 24), -1 where there is none.

  Made here, not by a shift in the model, where a shard would miss its
  neighbour's tokens. There is no label past the row's end, in padding, and
  from one segment to another.

  Args:
    tokens: rows of seq_len + 1 tokens.
    segments: the same shape.

  Returns:
    int32 [rows, n, seq_len].
  """
  rows, length = tokens.shape
  labels_BPL = np.full((rows, n, length - 1), NO_LABEL, np.int32)
  for p in range(n):
    ahead = p + 1
    same = segments[:, :-ahead] == segments[:, ahead:]
    same &= segments[:, :-ahead] > 0
    labels_BPL[:, p, : length - ahead] = np.where(
      same, tokens[:, ahead:], NO_LABEL
    )
  return labels_BPL


def _documents(corpus: shards.Corpus, share: float, train: bool) -> np.ndarray:
  held_out = corpus.chance < share
  return np.flatnonzero(~held_out if train else held_out)


def _segments(spans: tuple[Span, ...]) -> np.ndarray:
  lengths = [span.end - span.begin for span in spans]
  return np.repeat(np.arange(1, len(spans) + 1), lengths)
