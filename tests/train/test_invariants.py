"""How a batch is cut and computed changes no load, bias, loss or gradient.

Every loss term is compared alone: an error in the gradient of a small term is
lost in the total. A new axis joins with a line of CUTS.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.nn import precision
from dsv3.ops import losses
from dsv3.train import step
from dsv3.train.schedule import Hyper
from tests import micro
from tests.nn import weights
from tests.oracle import balance as oracle

BASE = {
  "schedule.z_weight": 1.0,  # the gradient of the z-loss is made at all
  "model.moe.n_routed": 8,
  "model.moe.n_groups": 4,
  "model.moe.top_groups": 2,
  "train.microbatches": 1,
  "model.layers": "scan",
  "model.remat": "none",
  "model.moe.kernel": "ragged",
  "model.attention.kernel": "naive",
}
CUTS = {
  "2 microbatches": {"train.microbatches": 2},
  "4 microbatches": {"train.microbatches": 4},
  "unrolled": {"model.layers": "unrolled"},
  "remat paper": {"model.remat": "paper"},
  "remat full": {"model.remat": "full"},
  "tiles": {"model.moe.kernel": "tiles"},
  "dense": {"model.moe.kernel": "dense"},
  "flash": {"model.attention.kernel": "flash"},
  "all": {
    "train.microbatches": 4,
    "model.layers": "unrolled",
    "model.remat": "paper",
    "model.moe.kernel": "tiles",
    "model.attention.kernel": "flash",
  },
}
# A weight so large that its term is all there is.
ALONE = {
  "main": losses.Weights(0.0, 0.0, 0.0),
  "mtp": losses.Weights(1e7, 0.0, 0.0),
  "balance": losses.Weights(0.0, 1e7, 0.0),
  "z": losses.Weights(0.0, 0.0, 1e7),
}
# The third row is padding, so one of 4 microbatches has no token at all.
SEGMENTS = np.ones((4, 33), int)
SEGMENTS[1, :9], SEGMENTS[1, 9:20], SEGMENTS[1, 20:] = 1, 2, 0
SEGMENTS[2] = 0
SEGMENTS[3, 30:] = 2


@functools.cache
def compiled(items):
  """(trees, batch, weights) -> loss, term means, loads, biases, gradients."""
  values = micro.config_of(dict(items))
  flat = weights.random(values.model, std=0.1)
  graphdef, params, router = weights.from_oracle(flat, values.model)

  @jax.jit
  def run(state, batch, weight):
    hyper = Hyper(0.0, weight.mtp, weight.balance, weight.z, 0.001, 0.0)
    loss, sums, count, grads, _ = step.accumulate(
      state, batch, hyper, graphdef=graphdef, values=values
    )
    moved = step.update_router(state.router, sums.load_XE, 0.001)
    means = losses.means(sums.terms, count)
    return loss, means, sums.load_XE, moved, grads

  state = step.TrainState(*[None] * 8).replace(
    step=jnp.int32(0),
    params=params,
    router=router,
    precision=precision.first_memory(params, values.model),
  )
  return values, state, run


def outcome(diff, term, batch=None):
  """Loss, term means, loads, biases and flat gradients, under one term."""
  values, state, run = compiled(tuple(sorted({**BASE, **diff}.items())))
  loss, means, load_XE, moved, grads = run(
    state, whole_batch() if batch is None else batch, ALONE[term]
  )
  grads = weights.to_oracle(grads, values.model)
  return loss, means, load_XE, weights.to_oracle(moved, values.model), grads


@functools.cache
def whole_batch():
  rows = np.random.default_rng(3).integers(0, 264, SEGMENTS.shape)
  return weights.batch_of(rows, 1, SEGMENTS)


def assert_equal_gradients(found, wanted, relative=2e-6):
  """By array, relative to its own norm; where that is noise, to all of them."""
  whole = np.sqrt(
    sum(np.sum(np.square(g, dtype=float)) for g in wanted.values())
  )
  assert whole > 0
  for key, gradient in wanted.items():
    size = max(np.linalg.norm(gradient), 1e-3 * whole)
    assert np.linalg.norm(found[key] - gradient) <= relative * size, key


def compare(diff, term, also=None):
  base = outcome(also or {}, term)
  cut = outcome({**(also or {}), **diff}, term)
  np.testing.assert_array_equal(cut[2], base[2])  # loads
  assert cut[2].dtype == jnp.int32
  for key, bias_E in base[3].items():
    np.testing.assert_array_equal(cut[3][key], bias_E)
  assert float(cut[0]) == pytest.approx(float(base[0]), rel=1e-6)
  for name, mean in base[1].items():
    assert float(cut[1][name]) == pytest.approx(float(mean), rel=1e-6), name
  assert_equal_gradients(cut[4], base[4])


@pytest.mark.parametrize("term", ALONE)
@pytest.mark.parametrize(
  "cut",
  [
    # What four microbatches show too, in a program of its own.
    pytest.param(cut, marks=[pytest.mark.slow] * (cut == "2 microbatches"))
    for cut in CUTS
  ],
)
def test_cut_changes_nothing(cut, term):
  compare(CUTS[cut], term)


@pytest.mark.parametrize("term", ["main", "balance"])
@pytest.mark.parametrize("cut", ["4 microbatches"])
def test_sec453_cut_changes_nothing_of_the_batch_wise_loss(cut, term):
  compare(CUTS[cut], term, {"model.moe.balancing": "bias+batch"})


def test_bias_moves_once_by_the_loads_of_the_whole_batch_mtp_included():
  """Recomputation and microbatches count no token twice: see the cuts."""
  _, _, load_XE, moved, _ = outcome({}, "main")
  values, state, _ = compiled(tuple(sorted(BASE.items())))
  before = weights.to_oracle(state.router, values.model)
  assert sorted(before) == [
    "layers/1/ffn/bias",
    "layers/2/ffn/bias",
    "mtp/0/block/ffn/bias",
  ]
  tokens, top_k = int((SEGMENTS[:, :-1] > 0).sum()), values.model.moe.top_k
  assert load_XE.sum(-1).tolist()[:2] == [tokens * top_k] * 2
  for load_E, (key, bias_E) in zip(load_XE, sorted(before.items())):
    wanted_E = oracle.algorithm1_bias(bias_E, np.asarray(load_E), 0.001)
    np.testing.assert_allclose(moved[key], wanted_E, rtol=0, atol=1e-7)
    assert not np.array_equal(moved[key], bias_E)


def without_row(batch, row):
  keep = np.arange(len(batch.tokens_BL)) != row
  return step.Batch(*(x[keep] for x in batch))


@pytest.mark.parametrize("term", ALONE)
def test_a_row_of_padding_changes_nothing(term):
  padded = outcome({}, term)
  alone = outcome({}, term, without_row(whole_batch(), 2))
  np.testing.assert_array_equal(alone[2], padded[2])
  assert float(alone[0]) == pytest.approx(float(padded[0]), rel=1e-6)
  assert_equal_gradients(alone[4], padded[4])


def test_tokens_of_padding_are_not_read():
  batch = whole_batch()
  other = np.where(batch.segments_BL > 0, batch.tokens_BL, 263)
  assert not np.array_equal(other, batch.tokens_BL)
  found = outcome({}, "main", batch._replace(tokens_BL=other.astype(np.int32)))
  wanted = outcome({}, "main")
  np.testing.assert_array_equal(found[2], wanted[2])
  assert float(found[0]) == float(wanted[0])
  assert_equal_gradients(found[4], wanted[4], 1e-9)


@pytest.mark.parametrize("term", ["main", "mtp"])
def test_packed_documents_are_as_if_in_rows_of_their_own(term):
  """Per token terms: the sequence-wise loss is of rows, however filled."""
  lengths = [9, 24, 30, 3]
  rng = np.random.default_rng(4)
  documents = [rng.integers(0, 264, n) for n in lengths]

  def batch(packing):
    rows, segments = np.zeros((2, 4, 33), int)
    for row, members in enumerate(packing):
      start = 0
      for segment, d in enumerate(members, 1):
        end = start + lengths[d]
        rows[row, start:end] = documents[d]
        segments[row, start:end] = segment
        start = end
    # The last position is only ever a label.
    segments[:, -1] = 0
    return weights.batch_of(rows, 1, segments)

  packed = outcome({}, term, batch([[0, 3], [2], [1], []]))
  apart = outcome({}, term, batch([[0], [1], [2], [3]]))
  np.testing.assert_array_equal(packed[2], apart[2])
  for name in ("main", "mtp_1", "z"):
    found, wanted = float(packed[1][name]), float(apart[1][name])
    assert found == pytest.approx(wanted, rel=1e-6), name
  assert_equal_gradients(packed[4], apart[4], 3e-6)


def test_a_batch_of_padding_is_finite_and_moves_nothing():
  batch = weights.batch_of(np.zeros((4, 33), int), 1, np.zeros((4, 33), int))
  for term in ALONE:
    loss, _, load_XE, moved, grads = outcome({}, term, batch)
    assert float(loss) == 0
    assert not load_XE.any()
    assert not any(g.any() for g in grads.values())
  before = outcome({}, "main")[3]
  values, state, _ = compiled(tuple(sorted(BASE.items())))
  for key, bias_E in weights.to_oracle(state.router, values.model).items():
    np.testing.assert_array_equal(moved[key], bias_E)
    assert not np.array_equal(before[key], bias_E)
