"""Sorting by expert drops no token and returns every one (Sec. 2.1.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import dispatch

T, K, E, D = 12, 3, 5, 4


def choose(kind):
  rng = np.random.default_rng(0)
  if kind == "one expert":
    return np.full((T, K), 2)
  return np.array([rng.permutation(E)[:K] for _ in range(T)])


@pytest.mark.parametrize("kind", ["random", "one expert"])
@pytest.mark.parametrize("padding", [0, 3, T])
def test_plan_is_a_bijection_sorted_by_expert(kind, padding):
  experts_TK, valid_T = choose(kind), np.arange(T) >= padding
  plan = dispatch.plan(experts_TK, valid_T, E)
  assert sorted(plan.order_A.tolist()) == list(range(T * K))
  np.testing.assert_array_equal(
    plan.order_A[plan.place_TK.ravel()], np.arange(T * K)
  )
  load_E = np.bincount(experts_TK[valid_T].ravel(), minlength=E)
  np.testing.assert_array_equal(plan.load_E, load_E)
  assert plan.load_E.dtype == jnp.int32
  sorted_A = experts_TK.ravel()[np.asarray(plan.order_A)][: load_E.sum()]
  np.testing.assert_array_equal(sorted_A, np.repeat(np.arange(E), load_E))


def weigh(x_TD, gate_TK, factor_E):
  """Every expert multiplies by its factor; padding is the first two tokens."""
  plan = dispatch.plan(choose("random"), np.arange(T) >= 2, E)
  x_AD = dispatch.dispatch(x_TD, plan)
  factor_A = jnp.repeat(factor_E, plan.load_E, total_repeat_length=T * K)
  inside_A = jnp.arange(T * K) < plan.load_E.sum()
  y_AD = jnp.where(inside_A, factor_A, 0)[:, None] * x_AD
  gate_A = dispatch.sort_gates(gate_TK, plan)
  return dispatch.combine(gate_A[:, None] * y_AD, plan)


def test_eq12_sum_of_gates_times_outputs_and_its_gradient():
  rng = np.random.default_rng(1)
  x_TD, gate_TK = rng.normal(size=(T, D)), rng.uniform(size=(T, K))
  factor_E = np.array([1.0, 2.0, 3.0, 5.0, 7.0])
  scale_T = (gate_TK * factor_E[choose("random")]).sum(-1)
  scale_T[:2] = 0
  args = [jnp.asarray(a, jnp.float32) for a in (x_TD, gate_TK, factor_E)]
  y_TD, pull = jax.vjp(weigh, *args)
  np.testing.assert_allclose(y_TD, scale_T[:, None] * x_TD, rtol=1e-5)
  dx_TD, dgate_TK, _ = pull(jnp.ones_like(y_TD))
  wanted = np.repeat(scale_T[:, None], D, axis=1)
  np.testing.assert_allclose(dx_TD, wanted, rtol=1e-5)
  wanted = factor_E[choose("random")] * x_TD.sum(-1, keepdims=True)
  wanted[:2] = 0
  np.testing.assert_allclose(dgate_TK, wanted, rtol=1e-5, atol=1e-6)
