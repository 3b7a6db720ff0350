"""Tokens to the devices of their experts and back, none dropped (Sec. 3.2.2).

A device has rows sorted by expert, and experts lie on the devices of an axis in
order, so what one device sends to another is one run of rows. How many they are
only the router knows: buffers are as long as they may have to be.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv3.ops import dispatch

KERNELS = ("auto", "blocks", "ragged")


@dataclasses.dataclass(frozen=True)
class Exchange:
  """`dispatch.through_experts`, with the experts over an axis of `size`.

  How rows move is the kernel: "blocks" of equal length by `all_to_all`, on any
  platform; "ragged" by `ragged_all_to_all`, only rows that there are, which XLA
  has not on CPUs; "auto" the one of the platform that is compiled for.
  """

  axis: str
  size: int
  kernel: str = "auto"

  def __call__(self, run, x_TD, experts_TK, gate_TK, n_experts: int):
    n_here, most = n_experts // self.size, len(x_TD)
    most *= min(experts_TK.shape[1], n_here)  # from one device to one other
    here = lax.axis_index(self.axis)
    to = (self.axis, most, self.kernel)
    elsewhere = []

    def run_there(x_AD, gate_A, load_E):
      load_PE = lax.all_gather(load_E, self.axis)  # of all devices P
      sent_PP = load_PE.reshape(self.size, self.size, n_here).sum(-1)
      elsewhere.append(sent_PP[here].sum() - sent_PP[here, here])
      x_RD = move(x_AD, sent_PP, *to)
      gate_R = move(gate_A[:, None], sent_PP, *to)
      load_PE = lax.dynamic_slice_in_dim(load_PE, here * n_here, n_here, axis=1)
      arrivals = plan_arrivals(load_PE, len(x_RD))
      x_RD = dispatch.dispatch(x_RD, arrivals)
      gate_R = dispatch.sort_gates(gate_R, arrivals)
      y_RD = dispatch.combine(run(x_RD, gate_R, arrivals.load_E), arrivals)
      return move_back(y_RD, sent_PP, *to, len(x_AD))

    y_TD, load_E, _ = dispatch.through_experts(
      run_there, x_TD, experts_TK, gate_TK, n_experts
    )
    moved = dispatch.nothing_moved()._replace(inside_nodes=elsewhere[0])
    return y_TD, load_E, moved


@dataclasses.dataclass(frozen=True)
class NodeExchange:
  """The same in two hops, with the experts over an axis of nodes and one inside.

  A token goes to a node once, with all that it has to do there, to the device of
  its own index; from there to its experts by `inside`. Its results are summed
  before they come back (Sec. 3.2.2). With node-limited routing a token goes to
  `top_groups` nodes at most (Sec. 2.1.2).
  """

  axis: str
  size: int
  inside: Exchange
  kernel: str = "auto"

  def __call__(self, run, x_TD, experts_TK, gate_TK, n_experts: int):
    n_there = n_experts // self.size
    node_TK = experts_TK // n_there  # of no expert: `size`, which is no node
    node_TM = distinct(node_TK, self.size)
    plan = dispatch.plan(node_TM, jnp.ones(len(x_TD), bool), self.size)
    sent_PP = lax.all_gather(plan.load_E, self.axis)
    here = lax.axis_index(self.axis)
    to = (self.axis, len(x_TD), self.kernel)
    x_RD = move(dispatch.dispatch(x_TD, plan), sent_PP, *to)
    gate_RK = move(dispatch.dispatch(gate_TK, plan), sent_PP, *to)
    # Experts count from 1 on the way: rows that are not there are zeros.
    id_AK = 1 + experts_TK[plan.order_A // node_TM.shape[1]]
    id_RK = _swap(id_AK, sent_PP, *to, len(x_RD))
    expert_RK = id_RK - 1 - here * n_there
    is_here_RK = (expert_RK >= 0) & (expert_RK < n_there)
    expert_RK = jnp.where(is_here_RK, expert_RK, n_there)
    y_RD, _, moved = self.inside(run, x_RD, expert_RK, gate_RK, n_there)
    y_AD = move_back(y_RD, sent_PP, *to, len(plan.order_A))
    load_E = jnp.bincount(experts_TK.reshape(-1), length=n_experts)
    between = sent_PP[here].sum() - sent_PP[here, here]
    by_expert = ((node_TK != here) & (node_TK < self.size)).sum()
    moved = moved._replace(between_nodes=between, saved=by_expert - between)
    moved = jax.tree.map(lambda n: n.astype(jnp.int32), moved)
    return dispatch.combine(y_AD, plan), load_E.astype(jnp.int32), moved


def distinct(node_TK: jax.Array, n_nodes: int) -> jax.Array:
  """The nodes of a token, each once, in order; `n_nodes` where there are fewer.

  >>> distinct(jnp.array([[2, 0, 2], [1, 1, 1]]), 3).tolist()
  [[0, 2, 3], [1, 3, 3]]
  """
  used_TS = (node_TK[..., None] == jnp.arange(n_nodes)).any(1)
  node_TS = jnp.sort(jnp.where(used_TS, jnp.arange(n_nodes), n_nodes), axis=1)
  return node_TS[:, : node_TK.shape[1]]


def plan_arrivals(load_PE: jax.Array, n_rows: int) -> dispatch.Plan:
  """The sort by expert of rows that came sorted by sender and then by expert."""
  n_here = load_PE.shape[1]
  ends = jnp.cumsum(load_PE.reshape(-1))
  row_R = jnp.arange(n_rows)
  expert_R = jnp.searchsorted(ends, row_R, side="right") % n_here
  return dispatch.plan(expert_R[:, None], row_R < ends[-1], n_here)


# Rows of a device: those for device 0 first, then those for device 1. Rows that
# arrive: those of device 0 first. Each of the two moves is the other's transpose.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def move(x_AD, sent_PP, axis: str, most: int, kernel: str) -> jax.Array:
  """Rows to where they are wanted: all that others have for here, then zeros.

  sent_PP[p, q] rows go from device p to device q, `most` of them at most.
  """
  n_out = len(sent_PP) * most
  return _swap(x_AD, sent_PP, axis, most, kernel, n_out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def move_back(y_RD, sent_PP, axis: str, most: int, kernel: str, n_out: int):
  """Rows back to where they came from, in the order in which they were sent."""
  return _swap(y_RD, sent_PP.T, axis, most, kernel, n_out)


def _move_forward(x_AD, sent_PP, *how):
  like = jnp.zeros((len(x_AD), 0))
  return move(x_AD, sent_PP, *how), (sent_PP, like)


def _move_backward(axis, most, kernel, saved, dy_RD):
  sent_PP, like = saved
  return move_back(dy_RD, sent_PP, axis, most, kernel, len(like)), None


def _move_back_forward(y_RD, sent_PP, *how):
  return move_back(y_RD, sent_PP, *how), sent_PP


def _move_back_backward(axis, most, kernel, n_out, sent_PP, dx_AD):
  return move(dx_AD, sent_PP, axis, most, kernel), None


move.defvjp(_move_forward, _move_backward)
move_back.defvjp(_move_back_forward, _move_back_backward)


def _swap(x_AD, sent_PP, axis, most, kernel, n_out):
  assert kernel in KERNELS, kernel
  blocks = functools.partial(_by_blocks, axis=axis, most=most, n_out=n_out)
  ragged = functools.partial(_by_runs, axis=axis, n_out=n_out)
  if kernel == "auto":
    return lax.platform_dependent(x_AD, sent_PP, cpu=blocks, default=ragged)
  return (blocks if kernel == "blocks" else ragged)(x_AD, sent_PP)


def _by_blocks(x_AD, sent_PP, *, axis, most, n_out):
  """All-to-all in blocks of equal length, each as long as it may have to be."""
  here = lax.axis_index(axis)
  sent_P, got_P = sent_PP[here], sent_PP[:, here]
  start_P = jnp.cumsum(sent_P) - sent_P
  slot_S = jnp.arange(most)
  row_PS = jnp.minimum(start_P[:, None] + slot_S, len(x_AD) - 1)
  is_row_PS = slot_S < sent_P[:, None]
  x_PSD = jnp.where(is_row_PS[..., None], x_AD[row_PS], 0)
  x_PSD = lax.all_to_all(x_PSD, axis, 0, 0)
  ends_P = jnp.cumsum(got_P)
  row_R = jnp.arange(n_out)
  from_R = jnp.searchsorted(ends_P, row_R, side="right")
  from_R = jnp.minimum(from_R, len(got_P) - 1)
  slot_R = jnp.clip(row_R - (ends_P - got_P)[from_R], 0, most - 1)
  y_RD = x_PSD[from_R, slot_R]
  return jnp.where((row_R < ends_P[-1])[:, None], y_RD, 0)


def _by_runs(x_AD, sent_PP, *, axis, n_out):
  """Runs of rows as long as they are."""
  here = lax.axis_index(axis)
  sent_P, got_P = sent_PP[here], sent_PP[:, here]
  return lax.ragged_all_to_all(
    x_AD,
    jnp.zeros((n_out, x_AD.shape[1]), x_AD.dtype),
    jnp.cumsum(sent_P) - sent_P,  # where a run begins here
    sent_P,
    (jnp.cumsum(sent_PP, axis=0) - sent_PP)[here],  # and with its receiver
    got_P,
    axis_name=axis,
  )
