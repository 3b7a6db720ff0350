"""Tokens to experts and back: sort by expert, no token dropped (Sec. 2.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
  """Where every assignment (a token and one of its experts) goes."""

  order_A: jax.Array  # int32: assignments, sorted by expert
  place_A: jax.Array  # int32: the place of each assignment in that order
  load_E: jax.Array  # int32: tokens per expert


def plan(experts_TK: jax.Array, valid_T: jax.Array, n_routed: int) -> Plan:
  """The stable sort of all assignments by expert.

  Tokens that are not valid (padding) sort behind the last expert and are in no
  load.

  >>> plan(jnp.array([[1, 0], [1, 2]]), jnp.array([True, True]), 3).load_E
  Array([1, 2, 1], dtype=int32)
  """
  experts_TK = jnp.where(valid_T[:, None], experts_TK, n_routed)
  experts_A = experts_TK.reshape(-1).astype(jnp.int32)
  order_A = jnp.argsort(experts_A, stable=True).astype(jnp.int32)
  place_A = jnp.argsort(order_A).astype(jnp.int32)
  ends_E = jnp.searchsorted(
    experts_A[order_A], jnp.arange(n_routed), side="right"
  )
  return Plan(order_A, place_A, jnp.diff(ends_E, prepend=0).astype(jnp.int32))


@jax.custom_vjp
def permute(x_AD: jax.Array, to_A: jax.Array, back_A: jax.Array) -> jax.Array:
  """Rows of `x_AD` in the order `to_A`; `back_A` is the inverse permutation.

  The gradient of a permutation is the inverse permutation. Said here because
  autodiff would scatter, which XLA runs row by row on a CPU.
  """
  del back_A
  return x_AD[to_A]


def _permute_forward(x_AD, to_A, back_A):
  return x_AD[to_A], back_A


def _permute_backward(back_A, gradient_AD):
  return gradient_AD[back_A], None, None


permute.defvjp(_permute_forward, _permute_backward)


def dispatch(x_TD: jax.Array, plan: Plan) -> jax.Array:
  """One row per assignment, sorted by expert."""
  n_tokens, dim = x_TD.shape
  top_k = plan.order_A.shape[0] // n_tokens
  x_TKD = jnp.broadcast_to(x_TD[:, None], (n_tokens, top_k, dim))
  return permute(x_TKD.reshape(-1, dim), plan.order_A, plan.place_A)


def combine(y_AD: jax.Array, gate_TK: jax.Array, plan: Plan) -> jax.Array:
  """Sum over a token's experts of gate times output (the sum of Eq. 12)."""
  y_TKD = permute(y_AD, plan.place_A, plan.order_A)
  y_TKD = y_TKD.reshape(*gate_TK.shape, -1)
  return jnp.einsum(
    "TKD,TK->TD",
    y_TKD,
    gate_TK.astype(y_AD.dtype),
    preferred_element_type=jnp.float32,
  )
