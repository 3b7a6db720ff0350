"""How a model multiplies on a CPU: float32 experts apart, bfloat16 where fast.

A step of decoding takes as long as its weights take to be read. XLA's CPU copies
an expert out of a stack before it multiplies, and a matrix again for a product of
a few rows; a float32 array of its own times one row it reads once.

It has one fast product of bfloat16, where the processor has the instructions:
with a float32 sum and two rows or more. It takes half the time of a float32
product if it is large, and as long or longer if it is small. Whatever else is
bfloat16 is converted to float32 and back, in every step.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3 import config
from dsv3.nn.moe import Experts
from dsv3.ops import grouped
from dsv3.ops.gemm import of_products, plain
from dsv3.ops.swiglu import swiglu

MANY_ROWS = 64  # from here on every product is of bfloat16
ROWS = 4  # of an expert on average; up to it they go one by one
BRANCHES = 256  # a program has one for every expert of every layer


def keeps_apart(model: config.Model) -> bool:
  """Is a branch for every expert fast, and are they few enough to compile soon?"""
  n_layers = model.n_moe_layers + model.mtp.depth
  few = 0 < n_layers * model.moe.n_routed <= BRANCHES
  return few and model.dtype == "float32"


class Apart(nnx.Module):
  """Experts, each an array of its own; no gradient. As `moe.Experts`."""

  def __init__(self, experts: Experts):
    self.w_gate_up, self.w_down = (
      nnx.List([nnx.Param(w_IO) for w_IO in w.get_value()])
      for w in (experts.w_gate_up, experts.w_down)
    )
    self.gemm = experts.gemm

  def __call__(
    self, x_AD: jax.Array, gate_A: jax.Array, load_E: jax.Array
  ) -> jax.Array:
    if len(x_AD) > ROWS * len(load_E):
      return self._in_tiles(x_AD, gate_A, load_E)
    row_A, upto_E = jnp.arange(len(x_AD)), jnp.cumsum(load_E)
    expert_A = jnp.sum(row_A[:, None] >= upto_E, axis=1)
    branches = [
      lambda *row, w=(up[...], down[...]): _swiglu_of(*row, *w)
      for up, down in zip(self.w_gate_up, self.w_down, strict=True)
    ]

    def multiply(i, y_AD):
      row = x_AD[i][None], gate_A[i][None]
      y_1D = lax.switch(expert_A[i], branches, *row)
      return lax.dynamic_update_slice_in_dim(y_AD, y_1D, i, 0)

    return lax.fori_loop(0, upto_E[-1], multiply, jnp.zeros_like(x_AD))

  def _in_tiles(self, x_AD, gate_A, load_E):
    """What many rows take longer to multiply than a stack to be made."""
    w_EI2O, w_EIO = map(_stacked, (self.w_gate_up, self.w_down))
    gate_up_A2F = self.gemm.grouped_dot(x_AD, w_EI2O, load_E)
    inputs = gate_up_A2F, gate_A
    return self.gemm.grouped_swiglu_dot(inputs, w_EIO[:, :, None], load_E)[:, 0]


def _stacked(weights: nnx.List) -> jax.Array:
  return jnp.stack([w[...] for w in weights])


def _swiglu_of(x_1D, gate_1, w_D2F, w_FD):
  """A row through an expert."""
  gate_up_12F = dot(x_1D, w_D2F)
  return dot(swiglu(gate_up_12F, gate_1), w_FD)


def _grouped_dot(x_AI, w_EIPO, load_E):
  w_EIO = w_EIPO.reshape(*w_EIPO.shape[:2], -1)
  x_AI = x_AI.astype(jnp.bfloat16)
  y_AO = grouped.grouped_matmul(x_AI, w_EIO, load_E, kernel="tiles")
  return y_AO.reshape(-1, *w_EIPO.shape[2:])


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
  """The `dot` of a Gemm, float32: of bfloat16 if w is, or if x has many rows.

  >>> dot(jnp.ones((1, 2)), jnp.ones((2, 3), jnp.bfloat16)).tolist()
  [[2.0, 2.0, 2.0]]
  """
  x_RI = x.reshape(-1, x.shape[-1])
  n_rows = len(x_RI)
  if n_rows < MANY_ROWS and w.dtype == jnp.float32:
    return plain("float32").dot(x, w)
  if n_rows == 1:  # twice, which is faster
    x_RI = jnp.broadcast_to(x_RI, (2, x_RI.shape[1]))
  y_RO = jax.lax.dot_general(
    x_RI.astype(jnp.bfloat16),
    w.reshape(w.shape[0], -1).astype(jnp.bfloat16),
    (((1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return y_RO[:n_rows].reshape(*x.shape[:-1], *w.shape[1:])


GEMM = of_products("float32", dot, _grouped_dot)


def as_used(weights: nnx.State) -> nnx.State:
  """The experts as bits of bfloat16, the head bfloat16, all else float32."""

  def leaf(path, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):  # where copies of experts are
      return x
    keys = {getattr(key, "key", None) for key in path}
    if "experts" in keys:
      return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(jnp.bfloat16 if "head" in keys else jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, weights)
