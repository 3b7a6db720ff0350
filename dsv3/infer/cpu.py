"""How a model multiplies on a CPU, where it decodes.

A step of decoding takes as long as its weights take to be read: `few_rows.py` has
the kernel for that. Elsewhere XLA multiplies. It has one fast product of bfloat16,
where the processor has the instructions: with a float32 sum and two rows or more, for
half the time of a float32 product if it is large. Whatever else is bfloat16 it
converts to float32 and back, in every step.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3.infer import few_rows
from dsv3.nn import mla
from dsv3.ops import grouped
from dsv3.ops.gemm import Gemm, of_products, plain

# From here on a bfloat16 model has products of bfloat16, and rounds otherwise: more
# than a step of decoding has, lest a text depend on how many there are.
MANY_ROWS = 512
ROWS = 64  # of an expert on average, as many
# Weights of an expert that stay in a core's cache while rows go by. Of 98K the kernel
# takes half of XLA's time at 128 rows, of 2.9M and more up to twice as long.
SMALL = 1 << 18


def gemm(dtype: str, *, alone: bool) -> Gemm:
  """The products, float32, of a model of that dtype whose weights are `as_used`.

  `alone`: on one device, so that a kernel sees whole operands.
  """
  kernel = alone and few_rows.available()
  rounds = dtype == "bfloat16"

  def dot(x, w):
    x_RI, w_IO = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
    n_rows = len(x_RI)
    if n_rows >= MANY_ROWS and rounds or w.dtype == jnp.uint16 and not kernel:
      y_RO = _rounded_dot(x_RI, w_IO)
    elif n_rows < MANY_ROWS and kernel:
      y_RO = few_rows.grouped(x_RI, w_IO[None], jnp.array([n_rows], jnp.int32))
    else:
      y_RO = plain("float32").dot(x_RI, w_IO)
    return y_RO.reshape(*x.shape[:-1], *w.shape[1:])

  def grouped_dot(x_AI, w_EIPO, load_E):
    w_EIO = w_EIPO.reshape(*w_EIPO.shape[:2], -1)
    few = len(x_AI) < ROWS * len(load_E)
    small = w_EIO[0].size <= SMALL and not rounds
    if kernel and (few or small):
      y_AO = few_rows.grouped(x_AI, w_EIO, jnp.cumsum(load_E))
    else:
      x_AI = x_AI.astype(dtype)
      y_AO = grouped.grouped_matmul(x_AI, w_EIO, load_E, kernel="tiles")
    return y_AO.reshape(-1, *w_EIPO.shape[2:])

  return of_products("float32", dot, grouped_dot)


def products(*, alone: bool) -> mla.Products:
  """What absorbed attention multiplies by; `alone` as for `gemm`."""
  if not (alone and few_rows.available()):
    return mla.PRODUCTS

  def dot(x_GRI, w_GIO):
    n_groups, n_rows, _ = x_GRI.shape
    upto_G = n_rows * jnp.arange(1, n_groups + 1)
    x_AI = x_GRI.reshape(-1, x_GRI.shape[-1])
    y_AO = few_rows.grouped(x_AI, _readable(w_GIO), upto_G)
    return y_AO.reshape(n_groups, n_rows, -1)

  def scores(x_GRI, y_GMI):
    return few_rows.scores(x_GRI, _readable(y_GMI))

  return mla.Products(dot, scores)


def _readable(w: jax.Array) -> jax.Array:
  """As `few_rows.py` takes it; bits that were made a bfloat16 are bits again."""
  if w.dtype == jnp.bfloat16:
    return lax.bitcast_convert_type(w, jnp.uint16)
  return w.astype(jnp.float32)


def _rounded_dot(x_RI, w_IO):
  """Of bfloat16, with a float32 sum."""
  n_rows = len(x_RI)
  if n_rows == 1:  # twice, which is faster
    x_RI = jnp.broadcast_to(x_RI, (2, x_RI.shape[1]))
  if w_IO.dtype == jnp.uint16:
    w_IO = lax.bitcast_convert_type(w_IO, jnp.bfloat16)
  y_RO = jnp.dot(
    x_RI.astype(jnp.bfloat16),
    w_IO.astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  )
  return y_RO[:n_rows]


def as_used(weights: nnx.State, dtype: str) -> nnx.State:
  """All float32, but experts and head of a bfloat16 model as its bits.

  The large ones, that is: half as much to read. As bfloat16 XLA would convert them
  to float32 in every step, all of them.
  """

  def leaf(path, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):  # where copies of experts are
      return x
    keys = {getattr(key, "key", None) for key in path}
    if dtype == "bfloat16" and keys & {"experts", "head"}:
      return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, weights)
