"""The router: Eq. 13-16 and the limit to nodes (Sec. 2.1.2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import routing
from tests.oracle import moe as oracle

T, D, E, K = 40, 6, 8, 2


def weights(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(T, D), draw(E, D), 0.3 * draw(E)


def route(u_TD, centroid_ED, bias_E, **changes):
  fields = dict(
    top_k=K,
    n_groups=4,
    top_groups=2,
    group_score="top2",
    gate="sigmoid",
    normalize=True,
    routed_scale=2.5,
  )
  return jax.jit(functools.partial(routing.route, **{**fields, **changes}))(
    u_TD, centroid_ED, bias_E
  )


def spread(found):
  """Gates [T, K] at their experts, [T, E]."""
  gate_TE = np.zeros(found.affinity_TE.shape)
  experts_TK = np.asarray(found.experts_TK)
  np.put_along_axis(gate_TE, experts_TK, np.asarray(found.gate_TK), -1)
  return gate_TE


def test_eq15_affinity_is_the_sigmoid_of_the_product():
  u_TD, centroid_ED, _ = weights()
  found_TE = routing.affinity(u_TD, centroid_ED, "sigmoid")
  wanted_TE = [oracle.eq15_affinity(centroid_ED, u_D) for u_D in u_TD]
  np.testing.assert_allclose(found_TE, wanted_TE, rtol=2e-6)


def test_eq15_affinity_is_float32_whatever_comes_in():
  """Two experts that bfloat16 logits would tie (spacing 1 from 128 on)."""
  u_TD = jnp.full((1, 64), 1.0, jnp.bfloat16)
  centroid_ED = np.zeros((2, 64), np.float32)
  centroid_ED[:, 0] = [0.7301, 0.7302]
  found_TE = routing.affinity(u_TD, centroid_ED, "sigmoid")
  assert found_TE.dtype == jnp.float32
  assert found_TE[0, 0] < found_TE[0, 1]


@pytest.mark.parametrize("shift", [0.3, -0.3, -1.2, -5.0])
@pytest.mark.parametrize("n_groups", [1, 2, 4, 8])
def test_eq13_eq16_gates_are_the_oracles(shift, n_groups):
  """Negative biases make scores negative; 8 groups have one expert each."""
  u_TD, centroid_ED, bias_E = weights()
  bias_E = bias_E + np.float32(shift)
  top_groups = {1: 1, 2: 1, 4: 2, 8: 3}[n_groups]
  changes = dict(n_groups=n_groups, top_groups=top_groups)
  found_TE = spread(route(u_TD, centroid_ED, bias_E, **changes))
  for u_D, gate_E in zip(u_TD.astype(np.float64), found_TE):
    s_E = oracle.eq15_affinity(centroid_ED.astype(np.float64), u_D)
    wanted_E = oracle.eq16_gate(s_E, bias_E, K, n_groups, top_groups)
    wanted_E = oracle.eq13_normalize(wanted_E, 2.5)
    np.testing.assert_allclose(gate_E, wanted_E, rtol=3e-6)


def test_eq14_without_bias_the_largest_affinities_are_chosen():
  u_TD, centroid_ED, _ = weights()
  found = route(
    u_TD, centroid_ED, None, n_groups=1, top_groups=1, normalize=False
  )
  for u_D, gate_E in zip(u_TD, spread(found) / 2.5):
    s_E = oracle.eq15_affinity(centroid_ED, u_D)
    np.testing.assert_allclose(gate_E, oracle.eq14_gate(s_E, K), rtol=3e-6)


def test_eq13_gates_sum_to_the_scale_even_when_all_sigmoids_underflow():
  found = route(*weights())
  np.testing.assert_allclose(found.gate_TK.sum(-1), 2.5, rtol=1e-6)
  u_TD, centroid_ED, bias_E = weights()
  gone = route(u_TD, np.full_like(centroid_ED, -300.0), bias_E)
  assert np.isfinite(gone.gate_TK).all()


def test_eq16_bias_moves_choice_not_weight():
  u_TD, centroid_ED, _ = weights()
  favourite_E = np.zeros(E, np.float32)
  favourite_E[5] = 10.0
  plain = dict(n_groups=1, top_groups=1, normalize=False, routed_scale=1.0)
  found = route(u_TD, centroid_ED, favourite_E, **plain)
  assert (found.experts_TK[:, 0] == 5).all()
  np.testing.assert_array_equal(found.gate_TK[:, 0], found.affinity_TE[:, 5])
  shifted = route(u_TD, centroid_ED, favourite_E + 3, **plain)
  np.testing.assert_array_equal(shifted.gate_TK, found.gate_TK)


def test_eq16_bias_gets_no_gradient_and_centroids_do():
  u_TD, centroid_ED, bias_E = weights()

  def loss(centroid_ED, bias_E):
    found = route(u_TD, centroid_ED, bias_E)
    return (found.gate_TK * np.arange(K)).sum(), found.experts_TK

  (centroid_grad, bias_grad), experts_TK = jax.grad(loss, (0, 1), has_aux=True)(
    centroid_ED, bias_E
  )
  np.testing.assert_array_equal(bias_grad, 0)
  moved = np.flatnonzero(np.abs(centroid_grad).sum(-1))
  np.testing.assert_array_equal(moved, np.unique(experts_TK))


def test_eq16_a_bias_step_of_a_thousandth_decides():
  """In bfloat16 0.73 + 0.001 is 0.73: the bias would never move a token."""
  u_TD = np.ones((1, 1), np.float32)
  centroid_ED = np.array([[1.0], [1.0005]], np.float32)
  plain = dict(top_k=1, n_groups=1, top_groups=1)
  before = route(u_TD, centroid_ED, np.zeros(2, np.float32), **plain)
  after = route(u_TD, centroid_ED, np.array([1e-3, 0], np.float32), **plain)
  assert [int(before.experts_TK[0, 0]), int(after.experts_TK[0, 0])] == [1, 0]


def limit(score_E, n_groups, top_groups, group_score="top2"):
  return routing.limit_groups(
    jnp.array([score_E]),
    n_groups=n_groups,
    top_groups=top_groups,
    group_score=group_score,
  )[0].tolist()


def test_node_limit_masks_with_minus_infinity_not_zero():
  scores = [-1.0, -0.5, -3.0, -2.0]  # zero would beat all of them
  assert limit(scores, 2, 1) == [-1.0, -0.5, -np.inf, -np.inf]


def test_node_limit_takes_the_best_pair_and_v2_the_best_expert():
  scores = [0.75, 0.0625, 0.5, 0.375]
  assert limit(scores, 2, 1) == [-np.inf, -np.inf, 0.5, 0.375]
  assert limit(scores, 2, 1, "max") == [0.75, 0.0625, -np.inf, -np.inf]


def test_ties_go_to_the_lower_group_and_expert():
  assert limit([0.5] * 6, 3, 2) == [0.5] * 4 + [-np.inf] * 2
  u_TD, centroid_ED, bias_E = weights()
  found = route(0 * u_TD, centroid_ED, 0 * bias_E)
  assert found.experts_TK.tolist() == [[0, 1]] * T


def test_no_token_reaches_more_than_its_groups():
  u_TD, centroid_ED, bias_E = weights()
  found = route(u_TD, centroid_ED, bias_E - 2, top_k=4)
  groups = [len({int(e) // 2 for e in row}) for row in found.experts_TK]
  assert set(groups) == {2}
  assert [len(set(row.tolist())) for row in found.experts_TK] == [4] * T


def test_v2_gate_softmax_over_experts_without_normalisation():
  u_TD, centroid_ED, _ = weights()
  found = route(
    u_TD,
    centroid_ED,
    None,
    gate="softmax",
    group_score="max",
    normalize=False,
    routed_scale=16.0,
  )
  logits_TE = u_TD.astype(np.float64) @ centroid_ED.T
  s_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
  for s_E, gate_E in zip(s_TE, spread(found)):
    best = oracle.top(s_E.reshape(4, 2).max(-1), 2)
    limited_E = np.where(np.isin(np.arange(E) // 2, best), s_E, -np.inf)
    chosen = oracle.top(limited_E, K)
    wanted_E = [16 * s if i in chosen else 0 for i, s in enumerate(s_E)]
    np.testing.assert_allclose(gate_E, wanted_E, rtol=3e-6)


def test_a_multiplicative_bias_chooses_by_scaled_affinities():
  """And, as an additive one, is in no gate."""
  u_TD, centroid_ED, bias_E = weights()
  limits = dict(n_groups=1, top_groups=1)
  found = route(u_TD, centroid_ED, bias_E, bias_form="multiplicative", **limits)
  s_TE = np.asarray(found.affinity_TE)
  wanted_TK = np.argsort(-s_TE * (1 + bias_E), axis=-1, kind="stable")[:, :K]
  np.testing.assert_array_equal(found.experts_TK, wanted_TK)
  gate_TK = np.take_along_axis(s_TE, wanted_TK, -1)
  gate_TK = 2.5 * gate_TK / gate_TK.sum(-1, keepdims=True)
  np.testing.assert_allclose(found.gate_TK, gate_TK, rtol=1e-6)
  additive = route(u_TD, centroid_ED, bias_E, **limits)
  assert (np.asarray(additive.experts_TK) != wanted_TK).any()
