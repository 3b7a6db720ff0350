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


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, in float32; kept are its inputs alone (Sec. 3.2.3).

  Autodiff would keep the sigmoid and the silu as well.
  """
  gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
  return (gate32 * jax.nn.sigmoid(gate32) * up32).astype(gate.dtype)


def _swiglu_forward(gate, up):
  return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, gradient):
  gate, up, gradient = (x.astype(jnp.float32) for x in (*saved, gradient))
  sigmoid = jax.nn.sigmoid(gate)
  dgate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
  dup = gradient * gate * sigmoid
  return dgate.astype(saved[0].dtype), dup.astype(saved[1].dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


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
