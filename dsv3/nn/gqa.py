"""Grouped-query and multi-head attention: what MLA is compared with."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3 import config
from dsv3.nn.layers import linear, matrix
from dsv3.nn.mla import (
  Queries,
  attend_from_here,
  output_matrix,
  project_out,
  rope_frequencies,
)
from dsv3.ops import rope
from dsv3.ops.gemm import Gemm
from dsv3.ops.placement import ONE_DEVICE, Peers, Placement


class Gqa(nnx.Module):
  """Grouped-query attention with RoPE on every head's own last dims.

  The baseline of DeepSeek-V2's ablations: `n_kv_heads` equal to `n_heads` is
  plain multi-head attention.
  """

  def __init__(
    self,
    model: config.Model,
    n_kv_heads: int,
    *,
    gemm: Gemm,
    key: jax.Array,
    placement: Placement = ONE_DEVICE,
  ):
    a, std = model.attention, model.init_std
    keys = jax.random.split(key, 6)  # as Mla, so that W_O begins as its own
    self.queries = Queries(model, gemm=gemm, key=keys[0])
    heads = lambda dim: (model.dim, n_kv_heads, dim)
    self.w_k = matrix(keys[1], "D HN", heads(a.nope_dim), std)
    self.w_kr = matrix(keys[2], "D HR", heads(a.rope_dim), std)
    self.w_v = matrix(keys[3], "D HV", heads(a.v_dim), std)
    self.w_o = output_matrix(keys[5], model)
    self.model = model
    self.gemm = gemm
    self.placement = placement

  def __call__(self, h_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
    positions_L = self.placement.dealt(jnp.arange(h_BLD.shape[1]))
    turns = rope_frequencies(self.model), positions_L
    q = self.queries(h_BLD, *turns)
    k_r = rope.rotate(linear(self.gemm.dot, h_BLD, self.w_kr), *turns)
    k = jnp.concatenate([linear(self.gemm.dot, h_BLD, self.w_k), k_r], axis=-1)
    v_BLHV = linear(self.gemm.dot, h_BLD, self.w_v)
    run = self.placement.spread(
      functools.partial(attend_to_all, model=self.model),
      ("BLHX", "BLHX", "BLHV", "BL"),
      "BLHV",
    )
    o_BLHV = run(q, k, v_BLHV, segments_BL)
    return project_out(o_BLHV, self.w_o, self.model, self.gemm)


def attend_to_all(peers: Peers, q, k, v_BLHV, segments_BL, *, model):
  """Attention of this device's queries over the keys of all positions."""
  k, v_BMHV = (peers.whole(x, "L", 1) for x in (k, v_BLHV))
  return attend_from_here(peers, q, k, v_BMHV, segments_BL, model)
