"""What the boxes are made of: weights, RMSNorm, the SwiGLU network."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3.ops.gemm import Gemm


def weight(key: jax.Array, shape: Sequence[int], std: float) -> nnx.Param:
  """A float32 parameter drawn from N(0, std^2) (Sec. 4.2)."""
  return nnx.Param(std * jax.random.normal(key, tuple(shape), jnp.float32))


class RmsNorm(nnx.Module):
  """Root-mean-square norm with a gain, in float32.

  Departs: gains start at 1; Sec. 4.2 draws all learnable parameters at random.
  """

  def __init__(self, dim: int, eps: float):
    self.gain = nnx.Param(jnp.ones(dim, jnp.float32))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
    return (x32 * scale * self.gain[...]).astype(x.dtype)


@jax.checkpoint
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, in float32; kept are its inputs alone (Sec. 3.2.3)."""
  product = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  return product.astype(gate.dtype)


class Ffn(nnx.Module):
  """The SwiGLU network: a dense layer's FFN, or the shared experts."""

  def __init__(
    self, dim: int, hidden: int, *, std: float, gemm: Gemm, key: jax.Array
  ):
    keys = jax.random.split(key, 3)
    self.w_gate = weight(keys[0], (dim, hidden), std)
    self.w_up = weight(keys[1], (dim, hidden), std)
    self.w_down = weight(keys[2], (hidden, dim), std)
    self.gemm = gemm

  def __call__(self, u: jax.Array) -> jax.Array:
    gate = checkpoint_name(self.gemm.dot(u, self.w_gate[...]), "ffn_gate")
    up = checkpoint_name(self.gemm.dot(u, self.w_up[...]), "ffn_up")
    return self.gemm.dot(swiglu(gate, up), self.w_down[...])
