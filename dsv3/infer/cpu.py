"""How a bfloat16 model multiplies on a CPU: some operands bfloat16, all else not.

XLA's CPU has one fast product of bfloat16, where the processor has the
instructions: with a float32 sum and two rows or more. It takes half the time of
a float32 product if it is large, and as long or longer if it is small. Whatever
else is bfloat16 is converted to float32 and back, in every step.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3.ops import grouped
from dsv3.ops.gemm import of_products, plain

MANY_ROWS = 64  # from here on every product is of bfloat16


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
      return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(jnp.bfloat16 if "head" in keys else jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, weights)
