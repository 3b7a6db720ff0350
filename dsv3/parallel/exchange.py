"""Rows to the devices of their experts and back, none dropped (Sec. 3.2.2).

Every device has rows sorted by expert, and the experts lie on the devices of an
axis in order, so what a device sends to another is one run of rows. How many is
known to the router alone: buffers are as long as they may have to be.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv3.ops import dispatch


@dataclasses.dataclass(frozen=True)
class Exchange:
  """The experts' rows, over an axis of `size` devices."""

  axis: str
  size: int

  def __call__(self, run, x_AD, gate_A, plan: dispatch.Plan):
    """run(x, gate, load) of the experts that are here; as `Peers.exchange`."""
    n_here = len(plan.load_E) // self.size
    load_PE = lax.all_gather(plan.load_E, self.axis)  # of all devices P
    sent_PP = load_PE.reshape(self.size, self.size, n_here).sum(-1)
    n_tokens, top_k = plan.place_TK.shape
    most = n_tokens * min(top_k, n_here)  # from one device to one other
    x_RD = move(x_AD, sent_PP, self.axis, most)
    gate_R = move(gate_A[:, None], sent_PP, self.axis, most)
    here = lax.axis_index(self.axis)
    load_PE = lax.dynamic_slice_in_dim(load_PE, here * n_here, n_here, axis=1)
    arrivals = plan_arrivals(load_PE, len(x_RD))
    x_RD = dispatch.dispatch(x_RD, arrivals)
    gate_R = dispatch.sort_gates(gate_R, arrivals)
    y_RD = run(x_RD, gate_R, arrivals.load_E)
    y_RD = dispatch.combine(y_RD, arrivals)
    return move_back(y_RD, sent_PP, self.axis, most, len(x_AD))


def plan_arrivals(load_PE: jax.Array, n_rows: int) -> dispatch.Plan:
  """The sort by expert of rows that came sorted by sender and then by expert."""
  n_here = load_PE.shape[1]
  ends = jnp.cumsum(load_PE.reshape(-1))
  row_R = jnp.arange(n_rows)
  expert_R = jnp.searchsorted(ends, row_R, side="right") % n_here
  return dispatch.plan(expert_R[:, None], row_R < ends[-1], n_here)


# Rows of a device: those for device 0 first, then those for device 1. Rows that
# arrive: those of device 0 first. Each of the two moves is the other's transpose.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def move(x_AD: jax.Array, sent_PP: jax.Array, axis: str, most: int):
  """Rows to where they are wanted: all that others have for here, then zeros.

  sent_PP[p, q] rows go from device p to device q, `most` of them at most.
  """
  here = lax.axis_index(axis)
  n_out = len(sent_PP) * most
  return _swap(x_AD, sent_PP[here], sent_PP[:, here], axis, most, n_out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def move_back(y_RD, sent_PP, axis: str, most: int, n_out: int):
  """Rows back to where they came from, in the order in which they were sent."""
  here = lax.axis_index(axis)
  return _swap(y_RD, sent_PP[:, here], sent_PP[here], axis, most, n_out)


def _swap(x_AD, sent_P, got_P, axis, most, n_out):
  """All-to-all in blocks of equal length, each as long as it may have to be."""
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


def _move_forward(x_AD, sent_PP, axis, most):
  like = jnp.zeros((len(x_AD), 0))
  return move(x_AD, sent_PP, axis, most), (sent_PP, like)


def _move_backward(axis, most, saved, dy_RD):
  sent_PP, like = saved
  return move_back(dy_RD, sent_PP, axis, most, len(like)), None


def _move_back_forward(y_RD, sent_PP, axis, most, n_out):
  return move_back(y_RD, sent_PP, axis, most, n_out), sent_PP


def _move_back_backward(axis, most, n_out, sent_PP, dx_AD):
  return move(dx_AD, sent_PP, axis, most), None


move.defvjp(_move_forward, _move_backward)
move_back.defvjp(_move_back_forward, _move_back_backward)
