import collections

import numpy as np
import pytest

from dsv3.data import bpe, fim, shards, tokenizer
from dsv3.data.packing import Packing
from dsv3.data.sources import Document
from dsv3.data.tokenizer import Bytes
from tests.data import conftest

SEQ_LEN = 16
N = 40


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
  """A BPE: bytes have no merged tokens to split."""
  path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  bpe.train_bpe([conftest.text(i, 300) for i in range(20)], 320, path)
  return tokenizer.load(str(path), 320)


@pytest.fixture(scope="module")
def corpus(tokens, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokens") / "corpus"
  documents = [
    Document(str(i), conftest.text(i, 4 * (i % 10)), 0.5) for i in range(N)
  ]
  shards.write(folder, documents, tokens, "test")
  return shards.open_folder(folder, tokens, "test")


def pack(corpus, tokens, seed=0, **rates):
  ids = np.arange(N)[::2]  # a split leaves holes
  return Packing(corpus, ids, tokens, SEQ_LEN, (seed, 0), **rates)


def unpack(packing, epoch):
  """The string of tokens of an epoch, from its rows alone, and the spans."""
  first = sum(packing.n_rows(e) for e in range(epoch))
  n_rows = packing.n_rows(epoch)
  rows = [packing.row(first + i) for i in range(n_rows)]
  assert {row.epoch for row in rows} == {epoch}
  place = np.argsort(packing.layout(epoch).row_order)
  rows = [rows[i] for i in place]
  for a, b in zip(rows, rows[1:]):
    assert a.tokens[-1] == b.tokens[0]
  ids = np.concatenate([row.tokens[:-1] for row in rows])
  return np.append(ids, rows[-1].tokens[-1]), rows


def documents(packing, tokens, epoch):
  """Whole documents of an epoch by number, without the end token."""
  ids, rows = unpack(packing, epoch)
  spans = [span for row in rows for span in row.spans]
  order = list(dict.fromkeys(span.document for span in spans))
  parts = np.split(ids, np.flatnonzero(ids == tokens.eos_id) + 1)[:-1]
  return dict(zip(order, [part[:-1] for part in parts]))


def original(corpus, i):
  return corpus.tokens[corpus.start[i] : corpus.start[i + 1]]


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_sec41_every_token_is_predicted_once_in_an_epoch(corpus, tokens, epoch):
  packing = pack(corpus, tokens)
  ids, rows = unpack(packing, epoch)
  whole = [np.append(original(corpus, i), tokens.eos_id) for i in packing.ids]
  lost = sum(map(len, whole)) - len(ids)
  assert 0 <= lost < SEQ_LEN
  found = documents(packing, tokens, epoch)
  assert len(found) >= len(packing.ids) - SEQ_LEN // 2
  for i, part in found.items():
    assert np.array_equal(part, original(corpus, i))


def test_spans_say_which_tokens_a_row_has(corpus, tokens):
  packing = pack(corpus, tokens)
  for n in range(packing.n_rows(0)):
    row = packing.row(n)
    parts = [
      np.append(original(corpus, s.document), tokens.eos_id)[s.begin : s.end]
      for s in row.spans
    ]
    assert np.array_equal(np.concatenate(parts), row.tokens)


def test_epochs_and_seeds_have_their_own_order(corpus, tokens):
  def first(seed, epoch):
    packing = pack(corpus, tokens, seed)
    return tuple(packing.layout(epoch).order)

  orders = [first(0, 0), first(0, 1), first(1, 0), first(1, 1)]
  assert len(set(orders)) == 4
  assert first(0, 1) == orders[1]


def test_rows_of_a_batch_are_not_pieces_of_one_document(corpus, tokens):
  order = pack(corpus, tokens).layout(0).row_order
  assert (np.diff(order) == 1).mean() < 0.1


def test_row_is_the_same_whatever_was_read_before(corpus, tokens):
  rates = {"fim_rate": 0.5, "split_rate": 0.5}
  straight = pack(corpus, tokens, **rates)
  total = sum(straight.n_rows(epoch) for epoch in range(3))
  rows = [straight.row(n).tokens for n in range(total)]
  for n in reversed(range(0, total, 7)):
    assert np.array_equal(pack(corpus, tokens, **rates).row(n).tokens, rows[n])
  assert straight.epochs(total) == 3.0


def test_sec41_fim_rate_and_the_text_comes_back(corpus, tokens):
  packing = pack(corpus, tokens, fim_rate=0.3)
  share, epochs = [], 30
  for epoch in range(epochs):
    for i, ids in documents(packing, tokens, epoch).items():
      whole = original(corpus, i)
      share.append(ids[0] == tokens.fim.begin)
      if not share[-1]:
        assert np.array_equal(ids, whole)
        continue
      assert len(whole) >= fim.SHORTEST
      hole, end = (
        ids.tolist().index(m) for m in (tokens.fim.hole, tokens.fim.end)
      )
      prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
      assert len(prefix) and len(suffix) and len(middle)
      assert np.array_equal(np.concatenate([prefix, middle, suffix]), whole)
  long = (np.diff(corpus.start)[packing.ids] >= fim.SHORTEST).mean()
  # Three standard deviations of as many coins.
  assert abs(np.mean(share) - 0.3 * long) < 3 * (0.21 / len(share)) ** 0.5


def test_sec41_fim_cuts_are_uniform_over_all_pairs():
  rng = np.random.default_rng(0)
  marks = Bytes.fim
  seen = collections.Counter()
  for _ in range(3000):
    ids = fim.fill_in_the_middle(np.arange(5), marks, rng).tolist()
    seen[ids.index(marks.hole), ids.index(marks.end)] += 1
  assert len(seen) == 6  # pairs of the four places between five tokens
  assert max(seen.values()) < 3000 / 6 + 4 * (3000 / 6) ** 0.5


def test_sec41_split_rate_and_the_text_is_unchanged(corpus, tokens):
  packing = pack(corpus, tokens, split_rate=0.3)
  added = mergeable = 0
  first_W = tokens.splits.first_W
  for epoch in range(10):
    for i, ids in documents(packing, tokens, epoch).items():
      whole = original(corpus, i)
      assert tokens.decode(ids) == tokens.decode(whole)
      added += len(ids) - len(whole)
      mergeable += int((first_W[whole] >= 0).sum())
  assert mergeable > 500
  assert abs(added / mergeable - 0.3) < 0.03


def test_splits_and_fim_together_keep_the_text(corpus, tokens):
  packing = pack(corpus, tokens, fim_rate=0.9, split_rate=0.9)
  for i, ids in documents(packing, tokens, 0).items():
    ids = ids.tolist()
    if ids[0] == tokens.fim.begin:
      hole, end = ids.index(tokens.fim.hole), ids.index(tokens.fim.end)
      ids = ids[1:hole] + ids[end + 1 :] + ids[hole + 1 : end]
    assert tokens.decode(ids) == tokens.decode(original(corpus, i))


def test_no_documents_make_no_rows(corpus, tokens):
  packing = Packing(corpus, np.arange(0), tokens, SEQ_LEN, (0, 0))
  assert packing.n_rows(0) == 0
