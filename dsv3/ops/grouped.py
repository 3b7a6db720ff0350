"""Grouped matmul: every expert multiplies its own rows, and no row is dropped.

Rows arrive sorted by expert (`dispatch.py`), so the routed experts of Eq. 12
are three matmuls whose weight changes with the row. Four kernels compute the
same product; they differ in the platform they are fast on:

  dense    every expert times every row, masked: E times the work, plainly right
  tiles    a loop over tiles of rows of one expert; any platform, the CPU's choice
  ragged   `jax.lax.ragged_dot`: native on TPU, masked dense work elsewhere
  tokamax  tuned GPU kernels, from the optional package of that name
"""

import functools
import importlib.util
import logging

import jax
import jax.numpy as jnp
from jax import lax

KERNELS = ("auto", "dense", "tiles", "ragged", "tokamax")
TILE = 256  # rows; measured on two AVX-512 cores with D 256 and 512, F 192


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
    w_EIO: one matrix an expert, of the rows' dtype.
    load_E: int32 rows of every expert. Rows past their sum give zeros.
    kernel: one of `KERNELS`; "auto" takes the fast one of the platform.
    out_dtype: of the result; products always accumulate in float32.

  Returns:
    y_AO. Gradients flow to x_AI and w_EIO, in their dtypes.

  Raises:
    ValueError: the kernel is unknown.
    ImportError: "tokamax" was named and is not installed.

  >>> x_AI = jnp.ones((3, 2))
  >>> w_EIO = jnp.stack([jnp.ones((2, 1)), 10 * jnp.ones((2, 1))])
  >>> grouped_matmul(x_AI, w_EIO, jnp.array([1, 1], jnp.int32)).tolist()
  [[2.0], [20.0], [0.0]]
  """
  if kernel == "auto":
    kernel = _fastest_here()
  if kernel == "dense":
    y_AO = _dense(x_AI, w_EIO, load_E)
  elif kernel == "tiles":
    y_AO = _tiles(x_AI, w_EIO, load_E)
  elif kernel == "ragged":
    y_AO = lax.ragged_dot(
      x_AI, w_EIO, load_E, preferred_element_type=jnp.float32
    )
  elif kernel == "tokamax":
    y_AO = _tokamax(x_AI, w_EIO, load_E)
  else:
    raise ValueError(
      f"grouped_matmul: kernel {kernel!r}, want one of {', '.join(KERNELS)}"
    )
  return y_AO.astype(out_dtype)


@functools.cache
def _fastest_here() -> str:
  platform = jax.default_backend()
  if platform == "cpu":
    return "tiles"
  if platform == "gpu":
    if importlib.util.find_spec("tokamax"):
      return "tokamax"
    logging.warning(
      "grouped_matmul: tokamax is not installed, so the GPU runs ragged_dot, "
      "which multiplies every row by every expert"
    )
  return "ragged"


def _dense(x_AI, w_EIO, load_E):
  expert_A = jnp.searchsorted(
    jnp.cumsum(load_E), jnp.arange(len(x_AI)), side="right"
  )
  mine_AE = jax.nn.one_hot(expert_A, len(load_E), dtype=x_AI.dtype)
  y_AEO = jnp.einsum(
    "AI,EIO->AEO", x_AI, w_EIO, preferred_element_type=jnp.float32
  )
  return jnp.einsum("AE,AEO->AO", mine_AE, y_AEO)


def _tokamax(x_AI, w_EIO, load_E):
  try:
    import tokamax
  except ImportError as error:
    raise ImportError(
      "grouped_matmul: kernel 'tokamax' needs the package: pip install tokamax"
    ) from error
  y_AO = tokamax.ragged_dot(
    x_AI, w_EIO, load_E, preferred_element_type=jnp.float32
  )
  past_A = jnp.arange(len(x_AI)) >= jnp.sum(load_E)
  return jnp.where(past_A[:, None], 0, y_AO)


# The tile kernel. A visit is one tile: at most TILE rows of one expert. The
# number of visits is dynamic, so an expert without rows costs nothing.


def _visits(load_E, n_rows):
  """Expert, first row and end row of every visit, and how many there are."""
  end_E = jnp.cumsum(load_E)
  last_visit_E = jnp.cumsum(-(-load_E // TILE))
  most = -(-n_rows // TILE) + len(load_E)
  visit = jnp.arange(most)
  expert = jnp.searchsorted(last_visit_E, visit, side="right")
  expert = jnp.minimum(expert, len(load_E) - 1)
  behind = last_visit_E[expert] - visit  # visits of this expert from here on
  tiles = -(-load_E[expert] // TILE)
  start = end_E[expert] - load_E[expert] + (tiles - behind) * TILE
  return expert, start, end_E[expert], last_visit_E[-1]


def _read(x_AI, start, end):
  """The tile's rows, zeros where they belong to the next expert."""
  rows = lax.dynamic_slice_in_dim(x_AI, start, TILE)
  mine = start + jnp.arange(TILE) < end
  return jnp.where(mine[:, None], rows, 0)


def _write(y_AO, rows, start):
  """Ascending visits repair the overhang of the tile before."""
  return lax.dynamic_update_slice_in_dim(
    y_AO, rows.astype(y_AO.dtype), start, 0
  )


def _dot(a, b, contract):
  return lax.dot_general(
    a, b, (contract, ((), ())), preferred_element_type=jnp.float32
  )


def _pad(x_AI):
  return jnp.pad(x_AI, ((0, TILE), (0, 0)))  # room for the last overhang


@jax.custom_vjp
def _tiles(x_AI, w_EIO, load_E):
  expert, start, end, n = _visits(load_E, len(x_AI))
  padded_AI = _pad(x_AI)

  def visit(i, y_AO):
    rows = _read(padded_AI, start[i], end[i])
    return _write(y_AO, _dot(rows, w_EIO[expert[i]], ((1,), (0,))), start[i])

  y_AO = jnp.zeros((len(padded_AI), w_EIO.shape[2]), jnp.float32)
  return lax.fori_loop(0, n, visit, y_AO)[: len(x_AI)]


def _tiles_fwd(x_AI, w_EIO, load_E):
  return _tiles(x_AI, w_EIO, load_E), (x_AI, w_EIO, load_E)


def _tiles_bwd(saved, dy_AO):
  x_AI, w_EIO, load_E = saved
  expert, start, end, n = _visits(load_E, len(x_AI))
  padded_AI, dy_AO = _pad(x_AI), _pad(dy_AO.astype(x_AI.dtype))

  def visit(i, gradients):
    dx_AI, dw_EIO = gradients
    e, x_rows = expert[i], _read(padded_AI, start[i], end[i])
    dy_rows = _read(dy_AO, start[i], end[i])
    dx_AI = _write(dx_AI, _dot(dy_rows, w_EIO[e], ((1,), (1,))), start[i])
    return dx_AI, dw_EIO.at[e].add(_dot(x_rows, dy_rows, ((0,), (0,))))

  dw_EIO = jnp.zeros(w_EIO.shape, jnp.float32)
  dx_AI, dw_EIO = lax.fori_loop(
    0, n, visit, (jnp.zeros_like(padded_AI), dw_EIO)
  )
  return dx_AI[: len(x_AI)], dw_EIO.astype(w_EIO.dtype), None


_tiles.defvjp(_tiles_fwd, _tiles_bwd)
