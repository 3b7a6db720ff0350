"""DeepSeekMoE: shared and routed experts behind a bias-balanced router."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3 import config
from dsv3.nn.layers import Ffn, linear, matrix, weight
from dsv3.ops import balance, copies, dispatch, routing
from dsv3.ops.gemm import Gemm
from dsv3.ops.placement import ONE_DEVICE, Peers, Placement


class RouterBias(nnx.Variable):
  """b of Eq. 16: float32, and no Param, so no optimizer and no decay."""


class Slots(nnx.Variable):
  """[E, C] int32: where an expert's copies are (`ops/copies.py`); `n` in all."""


class Traffic(NamedTuple):
  """What a router did: returned by the forward pass, never counted aside.

  Stacked over layers, every field has X in front.
  """

  load: jax.Array  # [E] int32, tokens per expert
  count: jax.Array  # [B, E] int32, of the balance losses (Eq. 18)
  mass: jax.Array  # [B, E] float32, of the balance losses (Eq. 20)
  moved: dispatch.Moved  # rows that went to experts on other devices


def no_traffic(n_sequences: int, n_routed: int) -> Traffic:
  """The stacked traffic of no router at all."""
  return Traffic(
    jnp.zeros((0, n_routed), jnp.int32),
    jnp.zeros((0, n_sequences, n_routed), jnp.int32),
    jnp.zeros((0, n_sequences, n_routed), jnp.float32),
    dispatch.Moved(*[jnp.zeros(0, jnp.int32)] * len(dispatch.Moved._fields)),
  )


class Router(nnx.Module):
  """Affinities, bias, group limit, gates (Eq. 13-16)."""

  def __init__(self, model: config.Model, *, key: jax.Array):
    m = model.moe
    # Of all experts: a token is compared with every one, wherever it lies.
    self.centroid = weight(key, "_ D", (m.n_routed, model.dim), model.init_std)
    if m.has_bias:
      self.bias = RouterBias(jnp.zeros(m.n_routed, jnp.float32))
    self.moe = m

  def __call__(self, u_TD: jax.Array) -> routing.Routing:
    m = self.moe
    return routing.route(
      u_TD,
      self.centroid[...],
      self.bias[...] if m.has_bias else None,
      top_k=m.top_k,
      n_groups=m.n_groups,
      top_groups=m.top_groups,
      group_score=m.group_score,
      gate=m.gate,
      normalize=m.normalize,
      routed_scale=m.routed_scale,
      bias_form=m.bias_form,
    )


class Experts(nnx.Module):
  """The routed experts' SwiGLU networks, over rows sorted by expert."""

  def __init__(self, model: config.Model, *, gemm: Gemm, key: jax.Array):
    key_in, key_out = jax.random.split(key)
    n, d, f = model.moe.n_routed, model.dim, model.moe.hidden
    std = model.init_std
    self.w_gate_up = matrix(
      key_in, "E D 2 F", (n, d, 2, f), std, role="expert_in"
    )
    self.w_down = matrix(key_out, "E F D", (n, f, d), std, role="expert_out")
    self.gemm = gemm

  def __call__(
    self, x_AD: jax.Array, gate_A: jax.Array, load_E: jax.Array
  ) -> jax.Array:
    """Each row through its expert, times its gate (a summand of Eq. 12).

    Departs: the gate multiplies before w_down, which is linear, and not after
    it. The backward pass then needs no output of an expert, the widest
    activation of a layer; in bfloat16 the rounding differs.
    """
    gemm = self.gemm
    gate_up_A2F = linear(gemm.grouped_dot, x_AD, self.w_gate_up, load_E)
    inputs = gate_up_A2F, gate_A
    return linear(gemm.grouped_swiglu_dot, inputs, self.w_down, load_E)


class Moe(nnx.Module):
  """Shared plus routed experts, no token dropped (Eq. 12)."""

  def __init__(
    self,
    model: config.Model,
    *,
    gemm: Gemm,
    key: jax.Array,
    placement: Placement = ONE_DEVICE,
  ):
    m = model.moe
    keys = jax.random.split(key, 3)
    self.router = Router(model, key=keys[0])
    self.experts = Experts(model, gemm=gemm, key=keys[1])
    if m.n_shared:
      # n_shared experts that every token takes are one of n times the width.
      self.shared = Ffn(
        model.dim,
        m.n_shared * m.hidden,
        std=model.init_std,
        gemm=gemm,
        key=keys[2],
      )
    self.slots: Slots | None = nnx.data(None)  # in training no expert is twice
    self.moe = m
    self.placement = placement

  def __call__(
    self, u_BLD: jax.Array, segments_BL: jax.Array
  ) -> tuple[jax.Array, Traffic]:
    """The output, without the residual, and the traffic."""
    run = self.placement.spread(
      route_and_run,
      ("", "", "", "BLD", "BL"),
      ("BLD", Traffic("_", "B_", "B_", "")),
    )
    modules = self.router, self.experts, self.slots
    y_BLD, traffic = run(*modules, u_BLD, segments_BL)
    if self.moe.n_shared:
      with jax.named_scope("shared"):
        y_BLD = y_BLD + self.shared(u_BLD)
    return y_BLD, traffic


def route_and_run(
  peers: Peers,
  router: Router,
  experts: Experts,
  slots: Slots | None,
  u_BLD,
  segments_BL,
) -> tuple[jax.Array, Traffic]:
  """The routed experts' part of Eq. 12 for the tokens of this device.

  The load is that of all devices: each has a share of the tokens.
  """
  m = router.moe
  u_TD = u_BLD.reshape(-1, u_BLD.shape[-1])
  routed = router(u_TD)
  valid_T1 = (segments_BL.reshape(-1) > 0)[:, None]
  experts_TK = jnp.where(valid_T1, routed.experts_TK, m.n_routed)  # or none
  with jax.named_scope("eq12"):
    to_TK, n_to = experts_TK, m.n_routed
    if slots is not None:
      to_TK, n_to = copies.choose(slots[...], experts_TK, slots.n), slots.n
    y_TD, load_E, moved = peers.exchange(
      experts, u_TD, to_TK, routed.gate_TK, n_to
    )
    if slots is not None:
      load_E = copies.load_of_experts(slots[...], load_E)
    y_TD = peers.total(y_TD, "F")
  count_BE, mass_BE = balance.sequence_statistics(
    routed.affinity_TE, segments_BL, m.top_k
  )
  traffic = Traffic(
    peers.total(load_E, "BL"),
    peers.total(count_BE, "L"),
    peers.total(mass_BE, "L"),
    peers.total(moved, "BLF"),  # each with a part of F has whole rows sent
  )
  return y_TD.reshape(u_BLD.shape), traffic
