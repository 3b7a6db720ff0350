import numpy as np
import pytest

from dsv3.config import ConfigError
from dsv3.data.batches import Batches, labels
from tests import micro


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_batch_does_not_depend_on_its_size_or_the_start(
  config_of, mask_documents
):
  config = config_of(fim_rate=0.3, mask_documents=mask_documents)
  source = Batches(config, 5)
  whole = source.rows(200, 8)
  parts = Batches(config, 5).rows(200, 3), Batches(config, 5).rows(203, 5)
  assert same(whole, [np.concatenate(pair) for pair in zip(*parts)])
  assert not same(whole, source.rows(208, 8))
  assert not same(whole, Batches(config, 6).rows(200, 8))


def test_batch_has_the_shapes_and_type_of_the_config(config_of):
  config = config_of(seq_len=24)
  batch = Batches(config, 0).rows(0, 5)
  assert batch.tokens_BL.shape == batch.segments_BL.shape == (5, 24)
  assert batch.labels_BPL.shape == (5, 1 + config.model.mtp.depth, 24)
  assert {x.dtype for x in batch} == {np.dtype(np.int32)}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_eq22_labels_equal_a_loop_over_positions(depth):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 99, (6, 13))
  segments = np.sort(rng.integers(0, 4, (6, 13)))  # 0: padding
  found = labels(tokens, segments, 1 + depth)
  for b in range(6):
    for p in range(1 + depth):
      for i in range(12):
        ahead = range(i, i + p + 2)
        ours = segments[b, i] > 0 and all(
          j < 13 and segments[b, j] == segments[b, i] for j in ahead
        )
        wanted = tokens[b, i + p + 1] if ours else -1
        assert found[b, p, i] == wanted


def test_masked_documents_do_not_predict_another(config_of):
  source = Batches(config_of(mask_documents=True), 0)
  batch = source.rows(0, 32)
  ends = batch.tokens_BL == source.tokenizer.eos_id
  assert ends.any()
  assert (batch.labels_BPL[:, 0][ends] == -1).all()
  assert (batch.labels_BPL[:, 0][~ends] >= 0).all()
  step = np.diff(batch.segments_BL)
  assert (batch.segments_BL[:, 0] == 1).all()
  assert np.array_equal(step, ends[:, :-1])


def test_sec41_unmasked_documents_are_one_segment(config_of):
  batch = Batches(config_of(), 0).rows(0, 32)
  assert (batch.segments_BL == 1).all()
  assert (batch.labels_BPL[:, 0] >= 0).all()
  assert (batch.labels_BPL[:, 1, :-1] >= 0).all()
  assert (batch.labels_BPL[:, 1, -1] == -1).all()


def test_splits_are_disjoint_and_complete(config_of, folder):
  config = config_of()
  texts = [set(Batches(config, 0, s).texts()) for s in ("train", "heldout")]
  assert texts[0] and texts[1] and not texts[0] & texts[1]
  assert texts[0] | texts[1] == {p.read_text() for p in folder.rglob("*.txt")}


def test_heldout_is_the_same_in_every_run_and_has_each_row_once(config_of):
  plain = config_of()
  other = config_of(fim_rate=0.9)
  source = Batches(plain, 0, "heldout")
  n = source.n_rows
  heldout = lambda values: Batches(values, 0, "heldout").rows(0, n)
  whole = heldout(plain)
  assert same(whole, heldout(other))
  assert same(whole, Batches(plain, 9, "heldout").rows(0, n))
  assert len({row.tobytes() for row in whole.tokens_BL}) == n
  left = sum(p.n_tokens for p in source.packings) - n * plain.data.seq_len
  assert 0 < left <= plain.data.seq_len


def test_rows_past_the_heldout_text_are_padding(config_of):
  source = Batches(config_of(), 0, "heldout")
  batch = source.rows(source.n_rows - 1, 3)
  assert (batch.labels_BPL[0, 0] >= 0).all()
  assert (batch.tokens_BL[1:] == source.tokenizer.pad_id).all()
  assert (batch.labels_BPL[1:] == -1).all()
  assert (batch.segments_BL[1:] == 0).all()


def test_bytes_of_labels_are_the_bytes_of_the_text(config_of):
  source = Batches(config_of(), 0, "heldout")
  labels_BL = source.rows(0, source.n_rows).labels_BPL[:, 0]
  counted = source.tokenizer.token_bytes(labels_BL)
  ends = int((labels_BL == source.tokenizer.eos_id).sum())
  assert counted == labels_BL.size - ends
  held = sum(len(text.encode()) for text in source.texts())
  assert 0 <= held - counted <= 2 * 32  # the rest of the epoch, the first token


def test_sources_come_by_weight(config_of, folder):
  sources = (str(folder / "sub"), str(folder / "[0-9]*.txt"))
  config = config_of(*sources, weights=(1.0, 3.0))
  source = Batches(config, 0)
  found = [row.source for row in source.describe(0, 1024)]
  assert [found.count(s) for s in sources] == [256, 768]
  reports = source.report(1024)
  assert [r.share for r in reports] == [0.25, 0.75]
  assert [r.epochs for r in reports] == [
    p.epochs(n) for p, n in zip(source.packings, (256, 768))
  ]
  by_size = Batches(config_of(*sources), 0)
  tokens = [p.n_tokens for p in by_size.packings]
  shares = [r.share for r in by_size.report(0)]
  assert np.allclose(shares, np.array(tokens) / sum(tokens), atol=1 / 1024)


def test_report_counts_the_documents_of_the_split(config_of):
  for split in ("train", "heldout"):
    source = Batches(config_of(), 0, split)
    (report,) = source.report(3)
    texts = list(source.texts())
    assert report.documents == len(texts)
    assert report.bytes == sum(len(text.encode()) for text in texts)
    assert report.tokens == report.bytes + report.documents
    assert 0 < report.epochs < 1


def test_description_is_the_text_of_the_row(config_of, folder):
  source = Batches(config_of(fim_rate=0.5), 0)
  for row in source.describe(40, 20):
    tokens = source.rows(row.row, 1).tokens_BL[0]
    assert row.text.startswith(source.tokenizer.decode(tokens)[:-1])
    for name, span in row.spans:
      text = (folder / name).read_text()
      marks = 4 if span.in_fim else 1
      assert span.end <= len(text.encode()) + marks


BAD = {
  "heldout": ({"heldout": 1e-6}, "config.data.heldout: found 1e-06"),
  "train": ({"seq_len": 10**6}, "less than a row to train on"),
  "weights": ({"weights": (0.0,)}, "config.data.weights: found"),
  "source": ({"sources": ("/nowhere",)}, "config.data.sources: /nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_corpus_that_cannot_be_is_one_line(config_of, name):
  diff, message = BAD[name]
  with pytest.raises(ConfigError, match=message) as caught:
    Batches(config_of(**diff), 0, "heldout" if name == "heldout" else "train")
  assert "\n" not in str(caught.value)


def test_fim_without_its_tokens_is_refused(config_of, tmp_path):
  from dsv3.data import bpe

  path = tmp_path / "tokenizer.json"
  bpe.train_bpe(["text"], 262, path)
  path.write_text(path.read_text().replace("<|fim_hole|>", "<|other|>"))
  config = config_of(tokenizer=str(path), fim_rate=0.1)
  with pytest.raises(ConfigError, match="config.data.fim_rate: found 0.1"):
    Batches(config, 0)
  assert Batches(config, 0, "heldout").n_rows > 0


def test_tiny_reads_the_library_of_this_interpreter(tmp_path):
  sources = {"data.sources": ("python",), "data.cache": str(tmp_path)}
  config = micro.config_of(sources)
  (report,) = Batches(config, 0).report(8)
  assert report.documents > 200 and report.bytes > 4e6
  assert Batches(config, 0, "heldout").n_rows > 100
