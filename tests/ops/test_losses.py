"""Sums, counts and weights of the loss: Eq. 17, 24, 25."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import losses
from dsv3.ops.cross_entropy import TokenLoss
from tests.oracle import mtp as oracle

COUNT_XBE = np.array([[[4, 4], [8, 0]], [[6, 2], [3, 5]]], np.int32)
MASS_XBE = np.array([[[4.0, 4], [7, 1]], [[5, 3], [4, 4]]], np.float32)
TOKEN_LOSSES = [
  TokenLoss(jnp.float32(x), jnp.float32(10 * x), jnp.int32(1))
  for x in (6, 4, 2)
]


def terms(balancing):
  return losses.terms(
    TOKEN_LOSSES,
    COUNT_XBE,
    MASS_XBE,
    COUNT_XBE.sum(1),
    top_k=1,
    balancing=balancing,
  )


def test_counts_are_of_the_main_labels_and_of_rows_with_a_token():
  labels_BPL = np.full((3, 2, 4), -1)
  labels_BPL[0, 0, :3] = labels_BPL[0, 1, :2] = 7
  segments_BL = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]])
  count = losses.counts(jnp.array(labels_BPL), jnp.array(segments_BL))
  assert [int(c) for c in count] == [3, 2]
  empty = losses.counts(jnp.full((1, 1, 2), -1), jnp.zeros((1, 2), int))
  assert [int(c) for c in empty] == [1, 1]


def test_eq24_every_depth_is_divided_by_the_main_count():
  mean = losses.means(terms("bias"), losses.Counts(8, 2))
  wanted = [oracle.eq24_loss(total, 8) for total in (4.0, 2.0)]
  assert [mean["mtp_1"], mean["mtp_2"]] == pytest.approx(wanted)
  assert mean["main"] == pytest.approx(6 / 8)
  assert mean["z"] == pytest.approx(60 / 8)


def test_eq25_mean_over_depths_times_lambda():
  mean = losses.means(terms("bias"), losses.Counts(8, 2))
  weighted = 0.3 * float(losses.mtp_loss(mean))
  assert weighted == pytest.approx(oracle.eq25_loss([4 / 8, 2 / 8], 0.3))
  assert float(losses.mtp_loss({"main": jnp.float32(1)})) == 0


def test_eq17_balance_is_summed_over_layers_and_averaged_over_rows():
  mean = losses.means(terms("bias+sequence"), losses.Counts(8, 2))
  by_layer = [(1 + 2 * 56 / 64) / 2, (2 * 36 / 64 + 2 * 32 / 64) / 2]
  assert float(mean["sequence"]) == pytest.approx(sum(by_layer))
  assert "batch" not in mean


def test_sec453_batch_wise_balance_is_of_the_sums_over_rows():
  mean = losses.means(terms("batch"), losses.Counts(8, 2))
  by_layer = [2 * (12 * 11 + 4 * 5) / 16**2, 2 * (9 * 9 + 7 * 7) / 16**2]
  assert float(mean["batch"]) == pytest.approx(sum(by_layer))
  assert "sequence" not in mean


@pytest.mark.parametrize("name", ["mtp", "balance", "z"])
def test_total_weighs_each_term_once(name):
  sums, count = terms("bias+sequence"), losses.Counts(8, 2)
  mean = losses.means(sums, count)
  nothing = losses.Weights(0.0, 0.0, 0.0)
  assert losses.total(sums, count, nothing) == pytest.approx(mean["main"])
  found = losses.total(sums, count, nothing._replace(**{name: 10.0}))
  added = {
    "mtp": (mean["mtp_1"] + mean["mtp_2"]) / 2,
    "balance": mean["sequence"],
    "z": mean["z"],
  }[name]
  assert float(found) == pytest.approx(float(mean["main"] + 10 * added))
