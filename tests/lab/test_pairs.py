"""Runs of one seed are pairs: the same text, and the same weights to begin with.

A parameter is drawn from a key that follows from its own place in the model, so
what an arm adds, drops or changes elsewhere leaves it as it is.
"""

import functools

import jax
import numpy as np
import pytest

from dsv3.data.batches import Batches
from dsv3.nn.transformer import make_model, split
from tests import micro

ARMS = {
  "another way": {
    "model.moe.balancing": "none",
    "model.moe.gate": "softmax",
    "model.dtype": "bfloat16",
    "model.layers": "unrolled",
    "model.mtp.depth": 2,
  },
  "another mixture": {
    "model.moe.n_shared": 0,
    "model.moe.n_routed": 8,
    "model.attention.q_rank": 0,
  },
  "dense, no MTP": {"model.ffn": "dense", "model.mtp.depth": 0},
  "multi-head attention": {"model.attention.kind": "mha"},
}


@functools.cache
def first_weights(arm: str) -> dict[str, np.ndarray]:
  model = micro.config_of(ARMS.get(arm, {})).model
  params = jax.jit(lambda: split(make_model(model, jax.random.key(3)))[1])()
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_a_seed_begin_with_the_same_weights_where_shapes_allow(arm):
  ours, theirs = first_weights(arm), first_weights("base")
  drawn, differ = set(), set()
  for name in ours.keys() & theirs.keys():
    a, b = ours[name], theirs[name]
    # The first dim is of layers, and the first layers stay the first.
    if a.shape[1:] != b.shape[1:] or a.std() == 0:  # gains are ones in any run
      continue
    drawn.add(name)
    n = min(len(a), len(b))
    if not np.array_equal(a[:n], b[:n]):
      differ.add(name)
  assert len(drawn) >= 10
  assert not differ


def test_further_layers_and_experts_leave_the_first_ones_as_they_are():
  ours, theirs = first_weights("another mixture"), first_weights("base")
  name = "['moe']['ffn']['experts']['w_down'].value"
  assert ours[name].shape[1] == 2 * theirs[name].shape[1]
  assert np.array_equal(ours[name][:1, :4], theirs[name][:1])


def test_arms_of_a_seed_read_the_same_rows_in_the_same_order(tmp_path):
  corpus = micro.write_corpus(tmp_path)
  rows = [
    Batches(micro.config_of(corpus | diff), 3).rows(5, 20)
    for diff in ({}, ARMS["another way"], ARMS["dense, no MTP"])
  ]
  for other in rows[1:]:
    assert np.array_equal(rows[0].tokens_BL, other.tokens_BL)
    assert np.array_equal(rows[0].labels_BPL[:, 0], other.labels_BPL[:, 0])
  apart = Batches(micro.config_of(corpus), 4).rows(5, 20)
  assert not np.array_equal(rows[0].tokens_BL, apart.tokens_BL)
