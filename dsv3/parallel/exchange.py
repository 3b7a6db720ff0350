"""Tokens to the devices of their experts and back, none dropped (Sec. 3.2.2).

A device has rows sorted by expert, and experts lie on the devices of an axis in
order, so what one device sends to another is one run of rows. How many they are
only the router knows. Buffers are as long as they may have to be; or they hold some
rows of every run, and what is longer goes in further rounds.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dsv3.ops import dispatch

KERNELS = ("blocks", "ragged")


def kernel_of(platform: str) -> str:
  """How rows move between devices of a platform.

  Asked once, of the mesh: with `lax.platform_dependent` XLA leaves a branch around
  every exchange of the forward pass, and overlaps nothing with it.
  """
  return "blocks" if platform == "cpu" else "ragged"


@dataclasses.dataclass(frozen=True)
class Exchange:
  """`dispatch.through_experts`, with the experts over an axis of `size`.

  How rows move is the kernel: "blocks" of equal length by `all_to_all`, on any
  platform; "ragged" by `ragged_all_to_all`, only rows that there are, which XLA
  has not on CPUs (`kernel_of`).

  `room` is how many rows of a run go at a time, over the mean of all runs; 0: all
  that may be. All devices, `everyone` by its axes, take as many rounds as the
  longest run wants. `run` is a pytree: what it holds has a gradient.
  """

  axis: str
  size: int
  kernel: str = "blocks"
  room: float = 0.0
  everyone: tuple[str, ...] = ()

  def __call__(
    self, run, x_TD, experts_TK, gate_TK, n_experts: int, expected: int = 0
  ):
    """`expected` are the choices of a device on average; 0: as many as here."""
    n_here, most = n_experts // self.size, len(x_TD)
    most *= min(experts_TK.shape[1], n_here)  # from one device to one other
    rows = most
    if self.room:
      mean = (expected or experts_TK.size) / self.size
      rows = min(most, math.ceil(self.room * mean))
    valid_T = jnp.ones(len(x_TD), bool)
    plan = dispatch.plan(experts_TK, valid_T, n_experts)
    load_PE = lax.all_gather(plan.load_E, self.axis)  # of all devices P
    load_PPE = load_PE.reshape(self.size, self.size, n_here)
    how, sizes = (run, x_TD, gate_TK), (plan, load_PPE)
    y_TD = self._send(0 if rows < most else None, rows, *how, *sizes)
    if rows < most:
      longest = lax.pmax(load_PPE.sum(-1).max(), self.everyone or self.axis)
      y_TD += _further(self, rows, most, how, sizes, longest)
    here = lax.axis_index(self.axis)
    sent_P = load_PPE[here].sum(-1)
    moved = dispatch.nothing_moved()._replace(
      inside_nodes=sent_P.sum() - sent_P[here],
      late=jnp.maximum(sent_P - rows, 0).sum(),
    )
    return y_TD, plan.load_E, moved

  def _send(self, first, rows, run, x_TD, gate_TK, plan, load_PPE):
    """What the experts make of rows first .. first + rows of every run, or of all."""
    here = lax.axis_index(self.axis)
    to = (self.axis, rows, self.kernel)
    part = plan
    if first is not None:
      part = part_of(plan, load_PPE[here].sum(-1), first, rows)
      load_PPE = part_of_loads(load_PPE, first, rows)
    sent_PP = load_PPE.sum(-1)
    x_AD = dispatch.dispatch(x_TD, part)
    gate_A = dispatch.sort_gates(gate_TK, part)
    x_RD = move(x_AD, sent_PP, *to)
    gate_R = move(gate_A[:, None], sent_PP, *to)
    arrivals = plan_arrivals(load_PPE[:, here], len(x_RD))
    x_RD = dispatch.dispatch(x_RD, arrivals)
    gate_R = dispatch.sort_gates(gate_R, arrivals)
    y_RD = dispatch.combine(run(x_RD, gate_R, arrivals.load_E), arrivals)
    y_AD = move_back(y_RD, sent_PP, *to, len(x_AD))
    return dispatch.combine(y_AD, part)


def _rounds(exchange: Exchange, rows: int, most: int, how, sizes, longest):
  """The sum of all rounds after the first, of which there may be none."""
  none = lambda run, x_TD, gate_TK: jnp.zeros_like(x_TD)

  @jax.checkpoint
  def of_round(first, how):
    there_is = lambda *how: exchange._send(first, rows, *how, *sizes)
    return lax.cond(first < longest, there_is, none, *how)

  def rounds(*how):
    add = lambda y_TD, first: (y_TD + of_round(first, how), None)
    firsts = jnp.arange(rows, most, rows)
    return lax.scan(add, jnp.zeros_like(how[1]), firsts)[0]

  return lax.cond(rows < longest, rounds, none, *how)


# The gradient computes a round again. Nothing of it is kept, whatever the model's
# remat would: as many are there as could be, and nearly all are skipped.
_further = jax.custom_vjp(_rounds, nondiff_argnums=(0, 1, 2))


def _further_forward(exchange, rows, most, how, *counts):
  return _rounds(exchange, rows, most, how, *counts), (how, counts)


def _further_backward(exchange, rows, most, saved, dy_TD):
  how, counts = saved
  again = lambda how: _rounds(exchange, rows, most, how, *counts)
  return *jax.vjp(again, how)[1](dy_TD), None, None


_further.defvjp(_further_forward, _further_backward)


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
  kernel: str = "blocks"

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
    inside = self.inside
    if isinstance(inside, Exchange):  # most rows and choices are of no token
      inside = functools.partial(inside, expected=experts_TK.size)
    y_RD, _, moved = inside(run, x_RD, expert_RK, gate_RK, n_there)
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


def part_of(
  plan: dispatch.Plan, sent_P: jax.Array, first, rows: int
) -> dispatch.Plan:
  """Of every device's run of assignments those from `first` on, `rows` at most.

  They lie side by side. Behind them is at least one row of no assignment, which is
  where those stand that are not of this part.
  """
  n = len(plan.order_A)
  start_P = jnp.cumsum(sent_P) - sent_P
  part_P = jnp.clip(sent_P - first, 0, rows)
  end_P = jnp.cumsum(part_P)
  last = len(sent_P) - 1
  size = min(n, rows * len(sent_P)) + 1
  row_A = jnp.arange(size)
  device_A = jnp.searchsorted(end_P, row_A, side="right")
  device_A = jnp.minimum(device_A, last)
  shift_P = start_P + first - (end_P - part_P)  # from a place here to one there
  order_A = plan.order_A[jnp.clip(row_A + shift_P[device_A], 0, n - 1)]
  device_TK = jnp.searchsorted(start_P + sent_P, plan.place_TK, side="right")
  device_TK = jnp.minimum(device_TK, last)
  along_TK = plan.place_TK - start_P[device_TK] - first
  is_here_TK = (along_TK >= 0) & (along_TK < part_P[device_TK])
  place_TK = plan.place_TK - shift_P[device_TK]
  place_TK = jnp.where(is_here_TK, place_TK, size - 1)
  return dispatch.Plan(order_A, place_TK, plan.load_E)


def part_of_loads(load_PPE: jax.Array, first, rows: int) -> jax.Array:
  """Rows of every expert among `rows` of each run, from `first` on.

  >>> part_of_loads(jnp.array([3, 0, 4]), 2, 4).tolist()
  [1, 0, 3]
  """
  ends_PPE = jnp.clip(jnp.cumsum(load_PPE, axis=-1) - first, 0, rows)
  return jnp.diff(ends_PPE, axis=-1, prepend=0)


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
  if kernel == "ragged":
    return _by_runs(x_AD, sent_PP, axis=axis, n_out=n_out)
  return _by_blocks(x_AD, sent_PP, axis=axis, most=most, n_out=n_out)


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
