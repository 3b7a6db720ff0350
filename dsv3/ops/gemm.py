"""How a Linear multiplies: one value, handed to the model.

The model knows two products, `dot` and `grouped_dot`. What they do (types,
kernels, quantisation) is decided here, so that an ablation of precision swaps
a value and touches no module.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3.ops import grouped


@dataclasses.dataclass(frozen=True)
class Gemm:
  """The matrix products of every Linear.

  `dot(x, w)` contracts the last dim of x with the first of w, whatever other
  dims they have. `grouped_dot(x_AI, w_EIO, load_E)` multiplies the rows of each
  expert with its matrix. Both return `dtype`.
  """

  dtype: str
  dot: Callable[[jax.Array, jax.Array], jax.Array]
  grouped_dot: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def plain(dtype: str, kernel: str = "auto") -> Gemm:
  """Operands in `dtype`, sums in float32 (Sec. 3.3.1 without FP8).

  `kernel` is that of `grouped.grouped_matmul`. float32 means it: TPUs and GPUs
  would shorten float32 operands unless told "highest".
  """
  return Gemm(
    dtype,
    lambda x, w: _dot(x, w, dtype),
    functools.partial(_grouped_dot, dtype=dtype, kernel=kernel),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, w: jax.Array, dtype: str) -> jax.Array:
  return _product(x, w, dtype, (x.ndim - 1,), (0,)).astype(dtype)


def _dot_forward(x, w, dtype):
  return _dot(x, w, dtype), (x, w)


def _dot_backward(dtype, residuals, gradient):
  """Dgrad in the type of x; Wgrad stays float32, as it is summed up later."""
  x, w = residuals
  rows, outs = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
  dx = _product(gradient, w, dtype, outs, tuple(range(1, w.ndim)))
  dw = _product(x, gradient, dtype, rows, rows)
  return dx.astype(x.dtype), dw.astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _product(a, b, dtype, dims_a, dims_b) -> jax.Array:
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    ((dims_a, dims_b), ((), ())),
    precision="highest" if dtype == "float32" else None,
    preferred_element_type=jnp.float32,
  )


def _grouped_dot(x_AI, w_EIO, load_E, *, dtype: str, kernel: str) -> jax.Array:
  # The weights go in as they are: cast inside, their gradient stays float32.
  y_AO = grouped.grouped_matmul(
    x_AI.astype(dtype), w_EIO, load_E, kernel=kernel
  )
  return y_AO.astype(dtype)
