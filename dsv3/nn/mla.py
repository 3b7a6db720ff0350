"""Multi-head Latent Attention (Sec. 2.1.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3 import config
from dsv3.nn.layers import RmsNorm, weight
from dsv3.ops import rope
from dsv3.ops.attention import attention
from dsv3.ops.gemm import Gemm


def rope_frequencies(model: config.Model) -> np.ndarray:
  """Frequencies of the rotated dims: plain, or YaRN's (Sec. 4.3)."""
  r, dim = model.rope, model.attention.rope_dim
  if r.yarn_factor <= 1:
    return rope.frequencies(dim, r.theta)
  return rope.yarn_frequencies(
    dim, r.theta, r.yarn_factor, r.original_len, r.beta_fast, r.beta_slow
  )


class Queries(nnx.Module):
  """Queries of all heads, through a latent or straight (Eq. 6-9)."""

  def __init__(self, model: config.Model, *, gemm: Gemm, key: jax.Array):
    a, std = model.attention, model.init_std
    keys = jax.random.split(key, 3)
    rank = a.q_rank or model.dim
    if a.q_rank:
      self.w_dq = weight(keys[0], (model.dim, a.q_rank), std)
      self.norm = RmsNorm(a.q_rank, model.norm_eps)
    self.w_uq = weight(keys[1], (rank, a.n_heads, a.nope_dim), std)
    self.w_qr = weight(keys[2], (rank, a.n_heads, a.rope_dim), std)
    self.rank = a.q_rank
    self.gemm = gemm

  def __call__(self, h_BLD, frequencies_R) -> jax.Array:
    c_q = h_BLD
    if self.rank:
      with jax.named_scope("eq6"):
        c_q = checkpoint_name(self.gemm.dot(h_BLD, self.w_dq[...]), "c_q")
      c_q = self.norm(c_q)
    with jax.named_scope("eq7"):
      q_c_BLHN = self.gemm.dot(c_q, self.w_uq[...])
    with jax.named_scope("eq8"):
      q_r_BLHR = rope.rotate(self.gemm.dot(c_q, self.w_qr[...]), frequencies_R)
    with jax.named_scope("eq9"):
      return jnp.concatenate([q_c_BLHN, q_r_BLHR], axis=-1)


class Mla(nnx.Module):
  """Multi-head Latent Attention (Eq. 1-11).

  Keys and values of all heads come from one latent of `kv_rank` and one rotated
  key of `rope_dim`, which are all that decoding has to keep. The norm is on
  the latent, never on the rotated key.
  """

  def __init__(self, model: config.Model, *, gemm: Gemm, key: jax.Array):
    a, std = model.attention, model.init_std
    keys = jax.random.split(key, 6)
    self.queries = Queries(model, gemm=gemm, key=keys[0])
    self.w_dkv = weight(keys[1], (model.dim, a.kv_rank), std)
    self.kv_norm = RmsNorm(a.kv_rank, model.norm_eps)
    self.w_uk = weight(keys[2], (a.kv_rank, a.n_heads, a.nope_dim), std)
    self.w_kr = weight(keys[3], (model.dim, a.rope_dim), std)
    self.w_uv = weight(keys[4], (a.kv_rank, a.n_heads, a.v_dim), std)
    self.w_o = weight(keys[5], (a.n_heads, a.v_dim, model.dim), std)
    self.model = model
    self.gemm = gemm

  def latent(self, h_BLD, frequencies_R) -> tuple[jax.Array, jax.Array]:
    """The latent c_kv (normed) and the shared rotated key (Eq. 1, 3)."""
    with jax.named_scope("eq1"):
      c_kv_BLC = checkpoint_name(self.gemm.dot(h_BLD, self.w_dkv[...]), "c_kv")
    with jax.named_scope("eq3"):
      k_r_BLR = checkpoint_name(self.gemm.dot(h_BLD, self.w_kr[...]), "k_r")
      k_r_BLR = rope.rotate(k_r_BLR[:, :, None], frequencies_R)[:, :, 0]
    return self.kv_norm(c_kv_BLC), k_r_BLR

  def expand(self, c_kv_BLC, k_r_BLR) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all heads from the latent (Eq. 2, 4, 5)."""
    with jax.named_scope("eq2"):
      k_c_BLHN = self.gemm.dot(c_kv_BLC, self.w_uk[...])
    with jax.named_scope("eq4"):
      n_heads, rope_dim = k_c_BLHN.shape[2], k_r_BLR.shape[-1]
      k_r_BLHR = jnp.broadcast_to(
        k_r_BLR[:, :, None], (*k_r_BLR.shape[:2], n_heads, rope_dim)
      )
      k = jnp.concatenate([k_c_BLHN, k_r_BLHR], axis=-1)
    with jax.named_scope("eq5"):
      v_BLHV = self.gemm.dot(c_kv_BLC, self.w_uv[...])
    return k, v_BLHV

  def __call__(self, h_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
    frequencies_R = rope_frequencies(self.model)
    q = self.queries(h_BLD, frequencies_R)
    k, v_BLHV = self.expand(*self.latent(h_BLD, frequencies_R))
    return attend(q, k, v_BLHV, self.w_o, segments_BL, self.model, self.gemm)


def attend(q, k, v_BLHV, w_o, segments_BL, model, gemm) -> jax.Array:
  """Attention of all heads and the output projection (Eq. 10, 11)."""
  a, r = model.attention, model.rope
  with jax.named_scope("eq10"):
    scale = rope.softmax_scale(q.shape[-1], r.yarn_factor, r.mscale)
    o_BLHV = attention(
      q,
      k,
      v_BLHV,
      scale=scale,
      segments_BL=segments_BL,
      kernel=a.kernel,
    )
  with jax.named_scope("eq11"):
    o_BLI = o_BLHV.reshape(*o_BLHV.shape[:2], -1)
    return gemm.dot(o_BLI, w_o[...].reshape(-1, model.dim))
