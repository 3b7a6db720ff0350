"""Grouped matmul: every expert multiplies its own rows, and no row is dropped.

Rows arrive sorted by expert (`dispatch.py`), so the routed experts of Eq. 12
are two matmuls whose weight changes with the row. Four kernels compute the
same product; they differ in the platform they are fast on:

  dense    every expert times every row, masked: E times the work, plainly right
  tiles    a loop over tiles of rows of one expert; any platform, the CPU's choice
  ragged   `jax.lax.ragged_dot`: native on TPU, masked dense work elsewhere
  tokamax  tuned GPU kernels, from the optional package of that name
"""

import functools
import importlib.util
import logging
import sys

import jax
import jax.numpy as jnp
from jax import lax

from dsv3.ops import tiles

KERNELS = ("auto", "dense", "tiles", "ragged", "tokamax")


def grouped_matmul(
  x_AI: jax.Array,
  w_EIO: jax.Array,
  load_E: jax.Array,
  *,
  kernel: str = "auto",
  out_dtype=jnp.float32,
) -> jax.Array:
  """Multiplies every row by the matrix of its expert (Eq. 12).

  Args:
    x_AI: rows, those of expert 0 first, then those of expert 1, and so on.
    w_EIO: one matrix an expert; it multiplies in the rows' dtype. "tiles" takes
      bits of bfloat16 as uint16 too, without a gradient: of bfloat16 XLA's CPU
      gathers no expert before it has made all of them float32.
    load_E: int32 rows of every expert. Rows past their sum give zeros.
    kernel: one of `KERNELS`; "auto" takes the fast one of the platform that the
      program is compiled for.
    out_dtype: of the result; products always accumulate in float32.

  Returns:
    y_AO. Gradients flow to x_AI and w_EIO, in their dtypes.

  Raises:
    ValueError: the kernel is unknown, or not "tiles" and w_EIO of bits.
    ImportError: "tokamax" was named and is not installed.

  >>> x_AI = jnp.ones((3, 2))
  >>> w_EIO = jnp.stack([jnp.ones((2, 1)), 10 * jnp.ones((2, 1))])
  >>> grouped_matmul(x_AI, w_EIO, jnp.array([1, 1], jnp.int32)).tolist()
  [[2.0], [20.0], [0.0]]
  """
  if w_EIO.dtype == jnp.uint16 and kernel != "tiles":
    raise ValueError(
      f"grouped_matmul: found bits of bfloat16 for {kernel!r}, want 'tiles'"
    )
  if kernel == "auto":
    y_AO = lax.platform_dependent(
      x_AI, w_EIO, load_E, cpu=tiles.matmul, cuda=_on_gpu(), default=_ragged
    )
  elif kernel == "dense":
    y_AO = _dense(x_AI, w_EIO, load_E)
  elif kernel == "tiles":
    y_AO = tiles.matmul(x_AI, w_EIO, load_E)
  elif kernel == "ragged":
    y_AO = _ragged(x_AI, w_EIO, load_E)
  elif kernel == "tokamax":
    y_AO = _tokamax(x_AI, w_EIO, load_E)
  else:
    raise ValueError(
      f"grouped_matmul: kernel {kernel!r}, want one of {', '.join(KERNELS)}"
    )
  return y_AO.astype(out_dtype)


def grouped_wgrad(
  x_AI: jax.Array,
  dy_AO: jax.Array,
  load_E: jax.Array,
  *,
  kernel: str = "auto",
) -> jax.Array:
  """Every expert's own x' dy, [E, I, O] float32: the gradient of its matrix.

  Arguments as of `grouped_matmul`, whose own gradient is this where the operands
  are those of its forward pass.

  >>> x_AI, dy_AO = jnp.array([[1.0], [2.0], [4.0]]), jnp.ones((3, 1))
  >>> load_E = jnp.array([2, 0, 1], jnp.int32)
  >>> grouped_wgrad(x_AI, dy_AO, load_E).ravel().tolist()
  [3.0, 0.0, 4.0]
  """
  kernels = {
    "dense": _dense_wgrad,
    "tiles": tiles.wgrad,
    "ragged": functools.partial(_ragged_wgrad, lax.ragged_dot_general),
    "tokamax": lambda *args: _ragged_wgrad(_tokamax_dot(), *args),
  }
  if kernel == "auto":
    gpu = kernels["tokamax" if _on_gpu() is _tokamax else "ragged"]
    return lax.platform_dependent(
      x_AI,
      dy_AO,
      load_E,
      cpu=tiles.wgrad,
      cuda=gpu,
      default=kernels["ragged"],
    )
  return kernels[kernel](x_AI, dy_AO, load_E)


@functools.cache
def _on_gpu():
  """Every platform's kernel is traced, so only a GPU host asks for tokamax."""
  if jax.default_backend() != "gpu":
    return _ragged
  if importlib.util.find_spec("tokamax"):
    return _tokamax
  logging.warning(
    "grouped_matmul: tokamax is not installed, so the GPU runs ragged_dot, "
    "which multiplies every row by every expert"
  )
  return _ragged


# Each kernel casts the weights itself and returns their gradient as float32, in
# which it is summed up over microbatches (Sec. 3.3.1).


@jax.custom_vjp
def _dense(x_AI, w_EIO, load_E):
  return _every_expert("AI,EIO->AEO", "AEO->AO", x_AI, w_EIO, load_E)


def _every_expert(subscripts, summed, x, w_EIO, load_E):
  y_AE = _einsum(subscripts, x, w_EIO.astype(x.dtype))
  mine_AE = _mine(load_E, len(x))
  return jnp.einsum(summed, jnp.where(mine_AE[..., None], y_AE, 0))


def _mine(load_E, n_rows: int):
  """[A, E]: is row a one of expert e?"""
  end_E = jnp.cumsum(load_E)
  row_A1 = jnp.arange(n_rows)[:, None]
  return (row_A1 >= end_E - load_E) & (row_A1 < end_E)


def _einsum(subscripts, a, b):
  return jnp.einsum(
    subscripts,
    a,
    b,
    precision=tiles.precision(a),
    preferred_element_type=jnp.float32,
  )


def _dense_forward(x_AI, w_EIO, load_E):
  return _dense(x_AI, w_EIO, load_E), (x_AI, w_EIO, load_E)


def _dense_backward(saved, dy_AO):
  x_AI, w_EIO, load_E = saved
  dy_AO = dy_AO.astype(x_AI.dtype)
  dx_AI = _every_expert("AO,EIO->AEI", "AEI->AI", dy_AO, w_EIO, load_E)
  dw_EIO = _dense_wgrad(x_AI, dy_AO, load_E)
  return dx_AI.astype(x_AI.dtype), dw_EIO.astype(w_EIO.dtype), None


def _dense_wgrad(x_AI, dy_AO, load_E):
  # Both: what is not finite in a row of another expert times zero is NaN.
  mine_AE1 = _mine(load_E, len(x_AI))[..., None]
  x_AEI = jnp.where(mine_AE1, x_AI[:, None], 0)
  dy_AEO = jnp.where(mine_AE1, dy_AO[:, None], 0)
  return _einsum("AEI,AEO->EIO", x_AEI, dy_AEO)


_dense.defvjp(_dense_forward, _dense_backward)


# Ragged kernels: dims that are contracted, the ragged one, and the experts'.
_FORWARD = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_DGRAD = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_WGRAD = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def _ragged(x_AI, w_EIO, load_E):
  return _by_ragged_dot(x_AI, w_EIO, load_E, lax.ragged_dot_general)


def _tokamax(x_AI, w_EIO, load_E):
  return _by_ragged_dot(x_AI, w_EIO, load_E, _tokamax_dot())


def _tokamax_dot():
  try:
    import tokamax
    from absl import flags
  except ImportError as error:
    raise ImportError(
      "grouped_matmul: kernel 'tokamax' needs the package: pip install tokamax"
    ) from error
  if (
    not flags.FLAGS.is_parsed()
  ):  # it would read the program's own command line
    flags.FLAGS(sys.argv[:1])
  return tokamax.ragged_dot_general


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_ragged_dot(x_AI, w_EIO, load_E, dot):
  w_EIO = w_EIO.astype(x_AI.dtype)
  return _inside(_ragged_dot(dot, x_AI, w_EIO, load_E, _FORWARD), load_E)


def _ragged_dot(dot, a, b, load_E, dims):
  return dot(
    a,
    b,
    load_E,
    dims,
    precision=tiles.precision(a),
    preferred_element_type=jnp.float32,
  )


def _inside(y_AO, load_E):
  """Zero past the experts' rows, where a kernel may leave what was there."""
  past_A = jnp.arange(len(y_AO)) >= jnp.sum(load_E)
  return jnp.where(past_A[:, None], 0, y_AO)


def _by_ragged_dot_forward(x_AI, w_EIO, load_E, dot):
  return _by_ragged_dot(x_AI, w_EIO, load_E, dot), (x_AI, w_EIO, load_E)


def _by_ragged_dot_backward(dot, saved, dy_AO):
  x_AI, w_EIO, load_E = saved
  dy_AO = dy_AO.astype(x_AI.dtype)
  w_in = w_EIO.astype(x_AI.dtype)
  dx_AI = _inside(_ragged_dot(dot, dy_AO, w_in, load_E, _DGRAD), load_E)
  dw_EIO = _ragged_wgrad(dot, x_AI, dy_AO, load_E)
  return dx_AI.astype(x_AI.dtype), dw_EIO.astype(w_EIO.dtype), None


def _ragged_wgrad(dot, x_AI, dy_AO, load_E):
  return _ragged_dot(dot, x_AI, dy_AO, load_E, _WGRAD)


_by_ragged_dot.defvjp(_by_ragged_dot_forward, _by_ragged_dot_backward)
