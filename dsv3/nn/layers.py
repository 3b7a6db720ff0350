"""What the boxes are made of: weights, Linears, RMSNorm, the SwiGLU network."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3.ops.gemm import Gemm
from dsv3.ops.linear import Weight


def weight(
  key: jax.Array, dims: str, shape: Sequence[int], std: float
) -> nnx.Param:
  """A float32 parameter drawn from N(0, std^2) (Sec. 4.2); dims as of Matrix."""
  values = std * jax.random.normal(key, tuple(shape), jnp.float32)
  return nnx.Param(values, dims=dims)


class Matrix(nnx.Param):
  """The weight of a Linear: what a recipe quantises (Sec. 3.3).

  `dims` says what its dims are, by name of the legend: `Q HN` has the inputs Q
  and the outputs HN; `D 2 F` two panels side by side; `E D 2 F` one for each
  expert. `_` is a dim that all devices hold whole. `role` is what the Linear is
  to a recipe (`ops/gemm.py`).
  """


def matrix(
  key: jax.Array, dims: str, shape: Sequence[int], std: float, role: str = ""
) -> Matrix:
  """The weight of a Linear, drawn from N(0, std^2) (Sec. 4.2)."""
  values = std * jax.random.normal(key, tuple(shape), jnp.float32)
  return Matrix(values, dims=dims, role=role)


def canonical(w: jax.Array, dims: str) -> jax.Array:
  """[..., I, P, O], or [..., E, I, P, O] of experts; stacked dims stay in front.

  >>> canonical(jnp.zeros((5, 8, 4, 3)), "Q HN").shape
  (5, 8, 1, 12)
  """
  groups = dims.split()
  if "2" not in groups:
    groups.insert(-1, "")  # one panel
  sizes, end = [], w.ndim
  for letters in reversed(groups):
    start = end - len(letters)
    sizes.insert(0, math.prod(w.shape[start:end]))
    end = start
  return w.reshape(*w.shape[:end], *sizes)


def linear(dot, x, w: Matrix, *load) -> jax.Array:
  """x through the Linear of `w`, by one of a Gemm's products."""
  value = w.get_value()
  weight = value if isinstance(value, Weight) else Weight(value)
  master = weight.master
  panels, letters = "2" in w.dims.split(), len(w.dims.split()[-1])
  outs = master.shape[master.ndim - letters - panels :]
  weight = dataclasses.replace(weight, master=canonical(master, w.dims))
  y = dot(x, weight, *load, role=w.role)
  return y.reshape(*y.shape[:-2], *outs)


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


class Ffn(nnx.Module):
  """The SwiGLU network: a dense layer's FFN, or the shared experts.

  Gate and up stand side by side in one weight [D, 2, F]: one matmul for both.
  """

  def __init__(
    self, dim: int, hidden: int, *, std: float, gemm: Gemm, key: jax.Array
  ):
    key_in, key_out = jax.random.split(key)
    self.w_gate_up = matrix(key_in, "D 2 F", (dim, 2, hidden), std)
    self.w_down = matrix(key_out, "F D", (hidden, dim), std)
    self.gemm = gemm

  def __call__(self, u: jax.Array) -> jax.Array:
    gate_up = linear(self.gemm.dot, u, self.w_gate_up)
    return linear(self.gemm.swiglu_dot, gate_up, self.w_down)
