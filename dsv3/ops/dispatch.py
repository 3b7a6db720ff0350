"""Tokens to experts and back: sort by expert, no token dropped (Sec. 2.1.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
  """Where every assignment (a token and one of its experts) goes."""

  order_A: jax.Array  # int32: assignments, sorted by expert
  place_TK: jax.Array  # int32: the place of each assignment in that order
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
  place_TK = place_A.reshape(experts_TK.shape)
  ends_E = jnp.searchsorted(
    experts_A[order_A], jnp.arange(n_routed), side="right"
  )
  return Plan(order_A, place_TK, jnp.diff(ends_E, prepend=0).astype(jnp.int32))


# The gradient of a gather is a scatter, which XLA runs row by row on a CPU. But
# every assignment has one place, so each gradient below is a gather as well.


@jax.custom_vjp
def dispatch(x_TD: jax.Array, plan: Plan) -> jax.Array:
  """One row per assignment, sorted by expert: [A, D]."""
  return x_TD[_token(plan)]


def _token(plan: Plan) -> jax.Array:
  """The token of every sorted assignment."""
  return plan.order_A // plan.place_TK.shape[1]


def _dispatch_forward(x_TD, plan):
  return dispatch(x_TD, plan), plan


def _dispatch_backward(plan, dx_AD):
  return _gather_sum(dx_AD, plan), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def sort_gates(gate_TK: jax.Array, plan: Plan) -> jax.Array:
  """The gate of every sorted assignment: [A]."""
  return gate_TK.reshape(-1)[plan.order_A]


def _sort_gates_forward(gate_TK, plan):
  return sort_gates(gate_TK, plan), plan


def _sort_gates_backward(plan, dgate_A):
  return dgate_A[plan.place_TK], None


sort_gates.defvjp(_sort_gates_forward, _sort_gates_backward)


@jax.custom_vjp
def combine(y_AD: jax.Array, plan: Plan) -> jax.Array:
  """Sum over a token's experts of their gated outputs (the sum of Eq. 12).

  [T, D] in the type of y_AD, summed in float32. The transpose of `dispatch`.
  """
  return _gather_sum(y_AD, plan)


def _gather_sum(y_AD, plan):
  y_TD = sum(y_AD[place_T].astype(jnp.float32) for place_T in plan.place_TK.T)
  return y_TD.astype(y_AD.dtype)


def _combine_forward(y_AD, plan):
  return combine(y_AD, plan), plan


def _combine_backward(plan, dy_TD):
  return dy_TD[_token(plan)], None


combine.defvjp(_combine_forward, _combine_backward)


class Moved(NamedTuple):
  """Rows that left the device of their token, forward, one way; int32.

  A token goes to a node once, whatever it has there; `saved` is how many more
  rows there would be between nodes if it went to each of its experts. `late` are
  those that a buffer had no room for at first (`mesh.expert_rows`).
  """

  between_nodes: jax.Array
  inside_nodes: jax.Array
  saved: jax.Array
  late: jax.Array


def nothing_moved() -> Moved:
  """Of a device that has all experts."""
  return Moved(*[jnp.int32(0)] * len(Moved._fields))


def through_experts(run, x_TD, experts_TK, gate_TK, n_experts: int):
  """Every token through its experts, all of which are here (Eq. 12).

  run(x_AD, gate_A, load_E) is what they do with rows sorted by expert. An expert
  of `n_experts` is none. Returns the sums y_TD, the load, and what was moved.
  """
  where = plan(experts_TK, jnp.ones(len(x_TD), bool), n_experts)
  gate_A = sort_gates(gate_TK, where)
  y_AD = run(dispatch(x_TD, where), gate_A, where.load_E)
  return combine(y_AD, where), where.load_E, nothing_moved()
