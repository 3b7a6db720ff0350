"""Multi-head Latent Attention (Sec. 2.1.1)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3 import config
from dsv3.nn.layers import Matrix, RmsNorm, linear, matrix
from dsv3.ops import rope
from dsv3.ops.attention import attention
from dsv3.ops.gemm import Gemm
from dsv3.ops.placement import ONE_DEVICE, Peers, Placement


def rope_frequencies(model: config.Model) -> np.ndarray:
  """Frequencies of the rotated dims: plain, or YaRN's (Sec. 4.3)."""
  r, dim = model.rope, model.attention.rope_dim
  if r.yarn_factor <= 1:
    return rope.frequencies(dim, r.theta)
  return rope.yarn_frequencies(
    dim, r.theta, r.yarn_factor, r.original_len, r.beta_fast, r.beta_slow
  )


class Products(NamedTuple):
  """Of groups of rows with a matrix each, float32, as `absorbed` needs them.

  dot(x_GRI, w_GIO): [G, R, O]. scores(x_GRI, y_GMI): each with each, [G, R, M].
  """

  dot: Callable
  scores: Callable


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(
    subscripts,
    x,
    y.astype(x.dtype),
    precision="highest" if x.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


PRODUCTS = Products(
  functools.partial(_product, "GRI,GIO->GRO"),
  functools.partial(_product, "GRI,GMI->GRM"),
)


class Queries(nnx.Module):
  """Queries of all heads, through a latent or straight (Eq. 6-9)."""

  def __init__(self, model: config.Model, *, gemm: Gemm, key: jax.Array):
    a, std = model.attention, model.init_std
    keys = jax.random.split(key, 3)
    rank = a.q_rank or model.dim
    if a.q_rank:
      self.w_dq = matrix(keys[0], "D Q", (model.dim, a.q_rank), std)
      self.norm = RmsNorm(a.q_rank, model.norm_eps)
    heads = lambda dim: (rank, a.n_heads, dim)
    self.w_uq = matrix(keys[1], "Q HN", heads(a.nope_dim), std)
    self.w_qr = matrix(keys[2], "Q HR", heads(a.rope_dim), std)
    self.rank = a.q_rank
    self.gemm = gemm

  def __call__(self, h_BLD, frequencies_R, positions_L=None) -> jax.Array:
    """[B, L, H, N + R]; positions as in `rotate`."""
    c_q = h_BLD
    if self.rank:
      with jax.named_scope("eq6"):
        c_q = checkpoint_name(linear(self.gemm.dot, h_BLD, self.w_dq), "c_q")
      c_q = self.norm(c_q)
    with jax.named_scope("eq7"):
      q_c_BLHN = linear(self.gemm.dot, c_q, self.w_uq)
    with jax.named_scope("eq8"):
      q_r_BLHR = linear(self.gemm.dot, c_q, self.w_qr)
      q_r_BLHR = rope.rotate(q_r_BLHR, frequencies_R, positions_L)
    with jax.named_scope("eq9"):
      return jnp.concatenate([q_c_BLHN, q_r_BLHR], axis=-1)


class Mla(nnx.Module):
  """Multi-head Latent Attention (Eq. 1-11).

  Keys and values of all heads come from one latent of `kv_rank` and one rotated
  key of `rope_dim`, which are all that decoding has to keep. The norm is on
  the latent, never on the rotated key.
  """

  def __init__(
    self,
    model: config.Model,
    *,
    gemm: Gemm,
    key: jax.Array,
    placement: Placement = ONE_DEVICE,
  ):
    a, std = model.attention, model.init_std
    keys = jax.random.split(key, 6)
    self.queries = Queries(model, gemm=gemm, key=keys[0])
    heads = lambda dim: (a.kv_rank, a.n_heads, dim)
    self.w_dkv = matrix(keys[1], "D C", (model.dim, a.kv_rank), std)
    self.kv_norm = RmsNorm(a.kv_rank, model.norm_eps)
    self.w_uk = matrix(keys[2], "C HN", heads(a.nope_dim), std)
    self.w_kr = matrix(keys[3], "D R", (model.dim, a.rope_dim), std)
    self.w_uv = matrix(keys[4], "C HV", heads(a.v_dim), std)
    self.w_o = output_matrix(keys[5], model)
    self.model = model
    self.gemm = gemm
    self.placement = placement

  def latent(
    self, h_BLD, frequencies_R, positions_L=None
  ) -> tuple[jax.Array, jax.Array]:
    """The latent c_kv (normed) and the shared rotated key (Eq. 1, 3)."""
    with jax.named_scope("eq1"):
      c_kv_BLC = checkpoint_name(
        linear(self.gemm.dot, h_BLD, self.w_dkv), "c_kv"
      )
    with jax.named_scope("eq3"):
      k_r_BLR = checkpoint_name(linear(self.gemm.dot, h_BLD, self.w_kr), "k_r")
      k_r_BLHR = rope.rotate(k_r_BLR[:, :, None], frequencies_R, positions_L)
    return self.kv_norm(c_kv_BLC), k_r_BLHR[:, :, 0]

  def expand(self, c_kv_BLC, k_r_BLR) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all heads from the latent (Eq. 2, 4, 5)."""
    return expand(self.w_uk, self.w_uv, c_kv_BLC, k_r_BLR, self.gemm)

  def by_head(self) -> tuple[jax.Array, jax.Array]:
    """W_UK as [H, N, C] and W_UV as [H, C, V]: what `absorbed` multiplies."""
    w_uk_HNC = jnp.transpose(self.w_uk[...], (1, 2, 0))
    return w_uk_HNC, jnp.transpose(self.w_uv[...], (1, 0, 2))

  def absorbed(
    self, q, c_kv_BMC, k_r_BMR, sees_BLM, w_uk_HNC, w_uv_HCV, products=PRODUCTS
  ) -> jax.Array:
    """Attention in the latent's space, for decoding: Eq. 10 without Eq. 2 and 5.

    q.(W_UK c) is (W_UK^T q).c, and sums of values are W_UV of sums of latents:
    the up-projections move to the queries and the output, so that no key or
    value of the past is ever made (DeepSeek-V2, Sec. 2.1.2).

    Args:
      q: queries, [B, L, H, N + R].
      c_kv_BMC: latents of the past, normed; k_r_BMR: its rotated keys.
      sees_BLM: True where a query sees a position; each sees at least one.
      w_uk_HNC, w_uv_HCV: of `by_head`; made anew in each step they take longer
        than the products.
      products: of groups, which are heads, or sequences.
    """
    a, r = self.model.attention, self.model.rope
    dot = lambda x, w: products.dot(x, w).astype(q.dtype)
    in_heads = lambda x_BLHX: _swapped(x_BLHX.reshape(-1, *x_BLHX.shape[2:]))
    in_sequences = lambda x: _swapped(x).reshape(len(q), -1, x.shape[-1])
    q_c_BLHN, q_r_BLHR = jnp.split(q, [a.nope_dim], axis=-1)
    q_BSC = in_sequences(dot(in_heads(q_c_BLHN), w_uk_HNC))  # S: L, then H
    q_BSR = q_r_BLHR.reshape(*q_BSC.shape[:2], -1)
    score_BSM = products.scores(q_BSC, c_kv_BMC)
    score_BSM += products.scores(q_BSR, k_r_BMR)
    score_BSM *= rope.softmax_scale(q.shape[-1], r.yarn_factor, r.mscale)
    sees_BSM = jnp.repeat(sees_BLM, a.n_heads, axis=1)
    score_BSM = jnp.where(sees_BSM, score_BSM, -jnp.inf)
    weight_BSM = jax.nn.softmax(score_BSM).astype(q.dtype)
    o_BLHC = dot(weight_BSM, c_kv_BMC).reshape(*q.shape[:3], -1)
    o_BSV = in_sequences(dot(in_heads(o_BLHC), w_uv_HCV))
    return self.output(o_BSV.reshape(*q.shape[:3], -1))

  def output(self, o_BLHV) -> jax.Array:
    """The output projection (Eq. 11)."""
    return project_out(o_BLHV, self.w_o, self.model, self.gemm)

  def __call__(self, h_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
    positions_L = self.placement.dealt(jnp.arange(h_BLD.shape[1]))
    turns = rope_frequencies(self.model), positions_L
    q = self.queries(h_BLD, *turns)
    gemm = self.gemm.of_part or self.gemm
    run = self.placement.spread(
      functools.partial(attend_to_all, model=self.model, gemm=gemm),
      ("", "", "BLHX", "BLC", "BLR", "BL"),
      "BLHV",
    )
    latent = self.latent(h_BLD, *turns)
    return self.output(run(self.w_uk, self.w_uv, q, *latent, segments_BL))


def _swapped(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, 0, 1)


def expand(
  w_uk, w_uv, c_kv_BLC, k_r_BLR, gemm: Gemm
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of all heads from the latent (Eq. 2, 4, 5)."""
  with jax.named_scope("eq2"):
    k_c_BLHN = linear(gemm.dot, c_kv_BLC, w_uk)
  with jax.named_scope("eq4"):
    n_heads, rope_dim = k_c_BLHN.shape[2], k_r_BLR.shape[-1]
    k_r_BLHR = jnp.broadcast_to(
      k_r_BLR[:, :, None], (*k_r_BLR.shape[:2], n_heads, rope_dim)
    )
    k = jnp.concatenate([k_c_BLHN, k_r_BLHR], axis=-1)
  with jax.named_scope("eq5"):
    v_BLHV = linear(gemm.dot, c_kv_BLC, w_uv)
  return k, v_BLHV


def attend_to_all(
  peers: Peers, w_uk, w_uv, q, c_kv_BLC, k_r_BLR, segments_BL, *, model, gemm
) -> jax.Array:
  """Attention of this device's heads and queries over all positions.

  Of the others' positions come the latent and the rotated key, C + R values a
  token, and not the keys and values of the heads.

  Departs: in FP8 a device quantises the gradient of all keys and values that
  comes of its own queries, and what is made of these parts is summed; one
  device quantises their sum. It rounds elsewhere, about as much. The report
  cuts no sequence.
  """
  c_kv_BMC, k_r_BMR = (peers.whole(x, "L", 1) for x in (c_kv_BLC, k_r_BLR))
  k, v_BMHV = expand(w_uk, w_uv, c_kv_BMC, k_r_BMR, gemm)
  return attend_from_here(peers, q, k, v_BMHV, segments_BL, model)


def attend_from_here(
  peers: Peers, q, k, v_BMHV, segments_BL, model
) -> jax.Array:
  """`attend` of this device's queries, with the keys of all positions at hand."""
  segments_BM = peers.whole(segments_BL, "L", 1)
  starts = peers.starts(q.shape[1])
  runs = (jnp.split(x, len(starts), axis=1) for x in (q, segments_BL))
  parts = [
    attend(q, k, v_BMHV, ids_BL, model, segments_BM=segments_BM, start=start)
    for q, ids_BL, start in zip(*runs, starts)
  ]
  return jnp.concatenate(parts, axis=1)


def output_matrix(key: jax.Array, model: config.Model) -> Matrix:
  """W_O of Eq. 11."""
  a = model.attention
  shape = (a.n_heads, a.v_dim, model.dim)
  return matrix(key, "HV D", shape, model.init_std, role="attention_out")


def attend(
  q, k, v_BMHV, segments_BL, model, *, segments_BM=None, start=None
) -> jax.Array:
  """Attention of all heads (Eq. 10).

  `segments_BM` of the keys and `start`, the position of the first query among
  them, are as in `attention`.
  """
  a, r = model.attention, model.rope
  with jax.named_scope("eq10"):
    return attention(
      q,
      k,
      v_BMHV,
      scale=rope.softmax_scale(q.shape[-1], r.yarn_factor, r.mscale),
      segments_BL=segments_BL,
      segments_BM=segments_BM,
      start=start,
      kernel=a.kernel,
    )


def project_out(o_BLHV, w_o, model, gemm) -> jax.Array:
  """The heads' outputs, side by side, through W_O (Eq. 11)."""
  with jax.named_scope("eq11"):
    o_BLI = o_BLHV.reshape(*o_BLHV.shape[:2], -1)
    return linear(gemm.dot, o_BLI, w_o)
