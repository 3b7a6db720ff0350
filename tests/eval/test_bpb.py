"""Held-out bits per byte against a model whose loss is known."""

import math

import jax
import jax.numpy as jnp
import pytest

from dsv3.data import batches, tokenizer
from dsv3.eval import bpb
from dsv3.nn import transformer
from dsv3.train import feed
from tests import micro


def test_uniform_model_takes_log2_of_the_vocabulary_a_label(tmp_path):
  """With a head of zeros; the end of a document is a label without bytes."""
  values = micro.config_of(micro.write_corpus(tmp_path))
  model = transformer.make_model(values.model, jax.random.key(0))
  model.head[...] = jnp.zeros_like(model.head[...])
  tokens = tokenizer.load("bytes", values.model.vocab_size)
  source = batches.Batches(values, 0, "heldout")
  heldout = list(feed.heldout(source, values.schedule.batch_size, 10**9))
  labels = [batch.labels_BPL[:, 0] for batch in heldout]
  n_labels = sum(int((x >= 0).sum()) for x in labels)
  n_bytes = sum(int(((x >= 0) & (x < 256)).sum()) for x in labels)
  assert 0 < n_bytes < n_labels
  score = bpb.score(*transformer.split(model), heldout, tokens)
  again = bpb.score(*transformer.split(model), heldout, tokens, microbatches=2)
  assert again._replace(loss=0, bits_per_byte=0) == score._replace(
    loss=0, bits_per_byte=0
  )
  assert again.loss == pytest.approx(score.loss, rel=1e-6)
  assert (score.tokens, score.bytes) == (n_labels, n_bytes)
  assert score.loss == pytest.approx(math.log(values.model.vocab_size))
  wanted = math.log2(values.model.vocab_size) * n_labels / n_bytes
  assert score.bits_per_byte == pytest.approx(wanted, rel=1e-5)
