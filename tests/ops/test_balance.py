"""Balance: Eq. 17-20, the bias update of Sec. 2.1.2, MaxVio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import balance
from tests.oracle import balance as oracle

B, L, E, K = 3, 10, 6, 2
SEGMENTS_BL = np.ones((B, L), np.int32)
SEGMENTS_BL[1, 7:] = 0
SEGMENTS_BL[2] = 0


@pytest.fixture(scope="module")
def statistics():
  rng = np.random.default_rng(0)
  affinity_BLE = rng.uniform(0.01, 1, (B, L, E)).astype(np.float32)
  count_BE, mass_BE = jax.jit(
    lambda s: balance.sequence_statistics(s, SEGMENTS_BL, K)
  )(affinity_BLE.reshape(-1, E))
  valid = [s[ids > 0] for s, ids in zip(affinity_BLE, SEGMENTS_BL)]
  return valid, count_BE, mass_BE


def test_eq18_share_counts_the_best_of_unbiased_affinities(statistics):
  valid, count_BE, _ = statistics
  assert count_BE.dtype == jnp.int32
  for s_TE, count_E in zip(valid[:2], count_BE):
    found_E = E / (K * len(s_TE)) * np.asarray(count_E)
    np.testing.assert_allclose(found_E, oracle.eq18_share(s_TE, K), rtol=1e-6)
  assert not count_BE[2].any()


def test_eq19_eq20_mass_is_the_sum_of_normalised_affinities(statistics):
  valid, _, mass_BE = statistics
  for s_TE, mass_E in zip(valid[:2], mass_BE):
    wanted_E = oracle.eq20_probability(s_TE)
    np.testing.assert_allclose(mass_E / len(s_TE), wanted_E, rtol=1e-6)
  one = balance.sequence_statistics(
    jnp.array([[0.1, 0.2, 0.1]]), np.ones((1, 1), np.int32), 1
  )
  wanted = oracle.eq19_normalize(np.array([0.1, 0.2, 0.1]))
  np.testing.assert_allclose(one[1][0], wanted, rtol=1e-6)
  assert not mass_BE[2].any()


def test_eq17_loss_is_the_oracles_and_0_for_padding(statistics):
  valid, count_BE, mass_BE = statistics
  found_B = balance.balance_loss(count_BE, mass_BE, K)
  wanted = [oracle.eq17_loss(s_TE, K, 1.0) for s_TE in valid[:2]]
  np.testing.assert_allclose(found_B, [*wanted, 0.0], rtol=1e-6)


def test_eq17_is_one_at_balance_and_experts_over_k_at_collapse():
  count_BE = jnp.array([[4] * E, [12, 12] + [0] * 4])
  mass_BE = jnp.array([[2.0] * E, [6.0, 6.0] + [0.0] * 4])
  found_B = balance.balance_loss(count_BE, mass_BE, K)
  np.testing.assert_allclose(found_B, [1.0, E / K], rtol=1e-6)


def test_eq18_share_has_no_gradient_and_eq20_has():
  s_TE = np.random.default_rng(1).uniform(0.1, 1, (L, E)).astype(np.float32)
  ones = np.ones((1, L), np.int32)

  def loss(s_TE):
    return balance.balance_loss(*balance.sequence_statistics(s_TE, ones, K), K)[
      0
    ]

  f_E = oracle.eq18_share(s_TE, K)

  def with_fixed_share(s_TE):
    p_E = (s_TE / s_TE.sum(-1, keepdims=True)).mean(0)
    return (f_E * p_E).sum()

  wanted = jax.grad(with_fixed_share)(s_TE)
  assert np.abs(wanted).max() > 0
  np.testing.assert_allclose(jax.grad(loss)(s_TE), wanted, rtol=1e-4, atol=1e-7)


def test_sec212_bias_of_an_overloaded_expert_falls_once_by_gamma():
  load_E = np.array([9, 3, 3, 0, 3, 0], np.int32)
  bias_E = np.linspace(-1, 1, E).astype(np.float32)
  found_E = balance.update_bias(bias_E, load_E, 0.001)
  wanted_E = oracle.algorithm1_bias(bias_E, load_E, 0.001)
  assert found_E.dtype == jnp.float32
  np.testing.assert_allclose(found_E, wanted_E, rtol=0, atol=1e-7)
  np.testing.assert_array_equal(balance.update_bias(bias_E, load_E, 0), bias_E)


def test_a_proportional_step_is_of_how_far_the_load_is_off():
  load_E = jnp.array([0, 2, 4, 10], jnp.int32)
  moved = balance.update_bias(jnp.ones(4), load_E, 0.5, "proportional")
  np.testing.assert_allclose(moved, [1.5, 1.25, 1.0, 0.25])
  idle = balance.update_bias(jnp.ones(4), 0 * load_E, 0.5, "proportional")
  np.testing.assert_array_equal(idle, jnp.ones(4))


@pytest.mark.parametrize("more", [[0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 1, 0]])
@pytest.mark.parametrize("least", [0, 1, 2**24, 2**29 - 3])
def test_bias_sign_is_exact_up_to_int32(least, more):
  """From 2^24 on, a float32 mean cannot tell an expert from its neighbour."""
  load_E = np.array(more, np.int64) + least
  assert load_E.sum() < 2**31
  found = balance.update_bias(jnp.zeros(4), load_E.astype(np.int32), 1.0)
  wanted = oracle.algorithm1_bias(np.zeros(4), load_E, 1.0)
  np.testing.assert_array_equal(found, wanted)


def test_bias_of_each_layer_moves_by_its_own_load():
  loads = np.array([[3, 1], [1, 3]], np.int32)
  moved = balance.update_bias(jnp.zeros((2, 2)), loads, 1.0)
  assert moved.tolist() == [[-1, 1], [1, -1]]


@pytest.mark.parametrize(
  "load, wanted",
  [
    ([5, 5, 5, 5], 0.0),
    ([20, 0, 0, 0], 3.0),
    ([6, 2, 4, 4], 0.5),
    ([0] * 4, 0),
  ],
)
def test_max_violation_of_known_loads(load, wanted):
  assert float(balance.max_violation(jnp.array(load))) == pytest.approx(wanted)
