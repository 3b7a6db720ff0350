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
def swiglu(gate_up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """silu(gate) * up, times a row's weight; kept are its inputs (Sec. 3.2.3).

  Autodiff would keep the sigmoid and the silu as well.

  Args:
    gate_up: [..., 2, F], the gates and what they open.
    weight: [...], float32, one a row; None is one.

  Returns:
    [..., F] in the type of gate_up, computed in float32 and rounded once.
  """
  gate, up = (gate_up[..., i, :].astype(jnp.float32) for i in (0, 1))
  hidden = gate * jax.nn.sigmoid(gate) * up
  if weight is not None:
    hidden *= weight[..., None]
  return hidden.astype(gate_up.dtype)


def _swiglu_forward(gate_up, weight):
  return swiglu(gate_up, weight), (gate_up, weight)


def _swiglu_backward(saved, gradient):
  gate_up, weight = saved
  gate, up = (gate_up[..., i, :].astype(jnp.float32) for i in (0, 1))
  gradient = gradient.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  dweight = None
  if weight is not None:
    dweight = jnp.sum(gradient * gate * sigmoid * up, axis=-1)
    gradient *= weight[..., None]
  dgate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
  dup = gradient * gate * sigmoid
  return jnp.stack([dgate, dup], axis=-2).astype(gate_up.dtype), dweight


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Ffn(nnx.Module):
  """The SwiGLU network: a dense layer's FFN, or the shared experts.

  Gate and up stand side by side in one weight [D, 2, F]: one matmul for both.
  """

  def __init__(
    self, dim: int, hidden: int, *, std: float, gemm: Gemm, key: jax.Array
  ):
    key_in, key_out = jax.random.split(key)
    self.w_gate_up = weight(key_in, (dim, 2, hidden), std)
    self.w_down = weight(key_out, (hidden, dim), std)
    self.gemm = gemm

  def __call__(self, u: jax.Array) -> jax.Array:
    gate_up = self.gemm.dot(u, self.w_gate_up[...])
    hidden = swiglu(checkpoint_name(gate_up, "ffn_gate_up"))
    return self.gemm.dot(hidden, self.w_down[...])
