"""The grouped matmul in tiles of one expert's rows: what a CPU runs.

An expert's rows go in large tiles while they last, then in small ones: large tiles
use the cores well, small ones waste few rows. The trip counts are dynamic, so an
expert without rows costs nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

TILES = (256, 128)  # rows, large then small; measured with F 192, D 256 and 512

FEW_ROWS = 32  # an expert on average; up to it ROWS at a time are faster
PAIR = 2  # tiles at once; 1 to 8 measured, 4 to 128 rows in all
ROWS = 8  # of a tile at most; 4 to 32 measured, 2 to 32 rows an expert


def precision(x):
  """float32 means it: GPUs and TPUs would shorten such operands."""
  return "highest" if x.dtype == jnp.float32 else None


def _over_tiles(step, carry, first, load, n_rows):
  """Calls step(carry, row, size, mine) for every tile of one expert.

  The tile is rows row .. row + size of all; `mine` masks the expert's own among
  them, or is None where all are.
  """
  large, small = (min(size, n_rows) for size in TILES)
  n_large = load // large
  rest, end = first + n_large * large, first + load

  def large_step(i, carry):
    return step(carry, first + i * large, large, None)

  def small_step(i, carry):
    wanted = rest + i * small
    row = jnp.minimum(wanted, n_rows - small)  # the last tile must fit
    rows = row + jnp.arange(small)
    return step(carry, row, small, (rows >= wanted) & (rows < end))

  carry = lax.fori_loop(0, n_large, large_step, carry)
  return lax.fori_loop(0, -(-(end - rest) // small), small_step, carry)


def _read(x_AI, row, size):
  return lax.dynamic_slice_in_dim(x_AI, row, size)


def _tile_pair(x_AI, dy_AO, row, size, mine):
  """A tile of both operands of Wgrad, zeros in rows of other experts.

  In both: what is not finite in one times zero in the other is NaN.
  """
  tiles = _read(x_AI, row, size), _read(dy_AO, row, size)
  if mine is None:
    return tiles
  return tuple(jnp.where(mine[:, None], tile, 0) for tile in tiles)


def _write(y_AO, tile, row, mine):
  tile = tile.astype(y_AO.dtype)
  if mine is not None:
    tile = jnp.where(mine[:, None], tile, _read(y_AO, row, len(tile)))
  return lax.dynamic_update_slice_in_dim(y_AO, tile, row, 0)


def _dot(a, b, dims_a, dims_b):
  return lax.dot_general(
    a,
    b,
    ((dims_a, dims_b), ((), ())),
    precision=precision(a),
    preferred_element_type=jnp.float32,
  )


def _few_rows(x_AI, w_EIO, load_E):
  """For few rows, as in decoding: reads the matrices of experts that have some.

  Reading them takes the time. The work is a list of tiles of few rows, one
  expert's each, and PAIR of them are multiplied at once. The list is made and
  the rows are moved before and after: every operation of the loop costs.
  """
  n_rows, n_out = len(x_AI), w_EIO.shape[2]
  size = _tile_size(n_rows, len(load_E))
  expert_N, rows_NR, n_tiles = _list_tiles(load_E, n_rows, size)
  x_NRI = x_AI.at[rows_NR].get(mode="fill", fill_value=0)

  def multiply(i, y_NRO):
    read = lambda x_N: lax.dynamic_slice_in_dim(x_N, i * PAIR, PAIR)
    y_PRO = jnp.einsum(
      "PRI,PIO->PRO",
      read(x_NRI),
      _cast(w_EIO[read(expert_N)], x_AI.dtype),
      precision=precision(x_AI),
      preferred_element_type=jnp.float32,
    )
    return lax.dynamic_update_slice_in_dim(y_NRO, y_PRO, i * PAIR, 0)

  y_NRO = jnp.zeros((*rows_NR.shape, n_out), jnp.float32)
  y_NRO = lax.fori_loop(0, -(-n_tiles // PAIR), multiply, y_NRO)
  y_AO = jnp.zeros((n_rows, n_out), jnp.float32)
  return y_AO.at[rows_NR].set(y_NRO, mode="drop")


def _list_tiles(load_E, n_rows: int, size: int):
  """The expert of every tile, its rows [N, R], and how many tiles there are.

  N is what may be needed at most, a multiple of PAIR. Rows that are not the
  expert's are `n_rows`.
  """
  n_experts = len(load_E)
  most = min(n_rows, n_experts + n_rows // size)
  tile_N = jnp.arange(-(-most // PAIR) * PAIR)
  first_E, tiles_E = jnp.cumsum(load_E) - load_E, -(-load_E // size)
  upto_E = jnp.cumsum(tiles_E)
  expert_N = jnp.sum(tile_N[:, None] >= upto_E, axis=1)
  expert_N = jnp.minimum(expert_N, n_experts - 1)  # past the last tile
  before_N = tile_N - (upto_E - tiles_E)[expert_N]
  rows_NR = (first_E[expert_N] + before_N * size)[:, None] + jnp.arange(size)
  mine_NR = rows_NR < (first_E + load_E)[expert_N][:, None]
  return expert_N, jnp.where(mine_NR, rows_NR, n_rows), upto_E[-1]


def _tile_size(n_rows: int, n_experts: int) -> int:
  """Rows of a tile: a power of two, four times an expert's average or more.

  >>> [_tile_size(n, 32) for n in (4, 16, 32, 1024)]
  [1, 2, 4, 8]
  """
  return min(ROWS, 1 << max(0, (4 * n_rows - 1) // n_experts).bit_length())


def _cast(w, dtype):
  """Weights in `dtype`; uint16 are the bits of bfloat16."""
  if w.dtype == jnp.uint16:
    w = lax.bitcast_convert_type(w, jnp.bfloat16)
  return w.astype(dtype)


@jax.custom_vjp
def matmul(x_AI, w_EIO, load_E):
  """y_AO in float32: `grouped.grouped_matmul` of kernel "tiles"."""
  if len(x_AI) <= FEW_ROWS * len(w_EIO):
    return _few_rows(x_AI, w_EIO, load_E)

  def of_expert(y_AO, expert):
    w_IO, first, load = expert
    w_IO = _cast(w_IO, x_AI.dtype)

    def step(y_AO, row, size, mine):
      y_tile = _dot(_read(x_AI, row, size), w_IO, (1,), (0,))
      return _write(y_AO, y_tile, row, mine)

    return _over_tiles(step, y_AO, first, load, len(x_AI)), None

  y_AO = jnp.zeros((len(x_AI), w_EIO.shape[2]), jnp.float32)
  experts = w_EIO, jnp.cumsum(load_E) - load_E, load_E
  return lax.scan(of_expert, y_AO, experts)[0]


def _forward(x_AI, w_EIO, load_E):
  return matmul(x_AI, w_EIO, load_E), (x_AI, w_EIO, load_E)


def _backward(saved, dy_AO):
  x_AI, w_EIO, load_E = saved
  dy_AO = dy_AO.astype(x_AI.dtype)

  def of_expert(dx_AI, expert):
    w_IO, first, load = expert
    w_IO = w_IO.astype(x_AI.dtype)

    def step(carry, row, size, mine):
      dx_AI, dw_IO = carry
      x_tile, dy_tile = _tile_pair(x_AI, dy_AO, row, size, mine)
      dw_IO += _dot(x_tile, dy_tile, (0,), (0,))
      dx_tile = _dot(dy_tile, w_IO, (1,), (1,))
      return _write(dx_AI, dx_tile, row, mine), dw_IO

    carry = dx_AI, jnp.zeros(w_IO.shape, jnp.float32)
    dx_AI, dw_IO = _over_tiles(step, carry, first, load, len(x_AI))
    return dx_AI, dw_IO.astype(w_EIO.dtype)

  experts = w_EIO, jnp.cumsum(load_E) - load_E, load_E
  return *lax.scan(of_expert, jnp.zeros_like(x_AI), experts), None


matmul.defvjp(_forward, _backward)


def wgrad(x_AI, dy_AO, load_E):
  """[E, I, O] in float32: `grouped.grouped_wgrad` of kernel "tiles"."""
  shape_IO = (x_AI.shape[1], dy_AO.shape[1])

  def of_expert(_, expert):
    def step(dw_IO, row, size, mine):
      x_tile, dy_tile = _tile_pair(x_AI, dy_AO, row, size, mine)
      return dw_IO + _dot(x_tile, dy_tile, (0,), (0,))

    zeros_IO = jnp.zeros(shape_IO, jnp.float32)
    return None, _over_tiles(step, zeros_IO, *expert, len(x_AI))

  return lax.scan(of_expert, None, (jnp.cumsum(load_E) - load_E, load_E))[1]
