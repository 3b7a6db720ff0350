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

import jax
import jax.numpy as jnp
from jax import lax

KERNELS = ("auto", "dense", "tiles", "ragged", "tokamax")
TILES = (256, 128)  # rows, large then small; measured with F 192, D 256 and 512

FEW_ROWS = 32  # an expert on average; up to it ROWS at a time are faster
PAIR = 2  # tiles at once; 1 to 8 measured, 4 to 128 rows in all
ROWS = 8  # of a tile at most; 4 to 32 measured, 2 to 32 rows an expert


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
      x_AI, w_EIO, load_E, cpu=_tiles, cuda=_on_gpu(), default=_ragged
    )
  elif kernel == "dense":
    y_AO = _dense(x_AI, w_EIO, load_E)
  elif kernel == "tiles":
    y_AO = _tiles(x_AI, w_EIO, load_E)
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
    "tiles": _tiles_wgrad,
    "ragged": functools.partial(_ragged_wgrad, lax.ragged_dot_general),
    "tokamax": lambda *args: _ragged_wgrad(_tokamax_dot(), *args),
  }
  if kernel == "auto":
    gpu = kernels["tokamax" if _on_gpu() is _tokamax else "ragged"]
    return lax.platform_dependent(
      x_AI,
      dy_AO,
      load_E,
      cpu=_tiles_wgrad,
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


def _precision(x):
  """float32 means it: GPUs and TPUs would shorten such operands."""
  return "highest" if x.dtype == jnp.float32 else None


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
    precision=_precision(a),
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
  except ImportError as error:
    raise ImportError(
      "grouped_matmul: kernel 'tokamax' needs the package: pip install tokamax"
    ) from error
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
    precision=_precision(a),
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


# The tile kernel. An expert's rows go in large tiles while they last, then in
# small ones: large tiles use the cores well, small ones waste few rows. The
# trip counts are dynamic, so an expert without rows costs nothing.


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
    precision=_precision(a),
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
      precision=_precision(x_AI),
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
def _tiles(x_AI, w_EIO, load_E):
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


def _tiles_forward(x_AI, w_EIO, load_E):
  return _tiles(x_AI, w_EIO, load_E), (x_AI, w_EIO, load_E)


def _tiles_backward(saved, dy_AO):
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


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _tiles_wgrad(x_AI, dy_AO, load_E):
  shape_IO = (x_AI.shape[1], dy_AO.shape[1])

  def of_expert(_, expert):
    def step(dw_IO, row, size, mine):
      x_tile, dy_tile = _tile_pair(x_AI, dy_AO, row, size, mine)
      return dw_IO + _dot(x_tile, dy_tile, (0,), (0,))

    zeros_IO = jnp.zeros(shape_IO, jnp.float32)
    return None, _over_tiles(step, zeros_IO, *expert, len(x_AI))

  return lax.scan(of_expert, None, (jnp.cumsum(load_E) - load_E, load_E))[1]
