"""FP8 matrix products on Hopper's tensor cores, promoted every 128 (Sec. 3.3.2).

Dense and grouped products with a scale for every 1 x 128 values of the rows and
every 1 x 128 or 128 x 128 of the columns. The letters: M rows of the result, N
its columns, K the contraction, J its blocks of 128. Both operands are E4M3 with
K last, the order that the tensor cores read FP8 in; scales are float32 and
multiply. Scales of 1 x 128 come as [J, M], those of a block side by side.

Beside every product stands the same in plain JAX, to test against and to fall
back on where `why_not` gives a reason. It adds up a block's products in float32;
of Hopper's own sums within a block only about 14 bits count (Sec. 3.3.2).
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # of a scale, and between promotions (Sec. 3.3)


def why_not(*sizes: int) -> str:
  """Why the kernels can't multiply matrices of these sizes here; "" if they can.

  >>> why_not(128, 100)
  'size 100 is no multiple of 128'
  """
  for size in sizes:
    if size % BLOCK or not size:
      return f"size {size} is no multiple of {BLOCK}"
  # One that is not there and is compiled for, or the first that is there.
  described = jax.sharding.get_abstract_mesh().abstract_device
  device = described or jax.devices()[0]
  if device.platform != "gpu":
    return f"the backend is {device.platform}, no Hopper GPU"
  if described:  # by its name alone
    fits = any(name in device.device_kind for name in ("H100", "H200", "H800"))
  else:
    fits = device.compute_capability == "9.0"
  return "" if fits else f"{device.device_kind} is no Hopper GPU"


def matmul(
  a_MK: jax.Array,
  a_scale_JM: jax.Array,
  b_NK: jax.Array,
  b_scale: jax.Array,
  *,
  out_dtype=jnp.bfloat16,
  tiling=None,
) -> jax.Array:
  """Multiplies a with the transpose of b: Fprop, Dgrad and Wgrad of a Linear.

  Args:
    a_MK: E4M3. M, N and K are multiples of 128.
    a_scale_JM: of 1 x 128 values of a.
    b_NK: E4M3.
    b_scale: [N / 128, J], of 128 x 128 values of b, as weights have; or [J, N],
      of 1 x 128, as the second operand of Wgrad has.
    out_dtype: bfloat16 or float32, in which the sums are.
    tiling: a `hopper_kernel.Tiling`, where not the one chosen by N.

  Returns:
    y_MN.
  """
  from dsv3.ops import hopper_kernel as kernel

  (M, K), N = a_MK.shape, len(b_NK)
  _check(a_MK, a_scale_JM, b_NK, b_scale)
  tiling = tiling or _tiling(kernel, N, b_scale.shape != (K // BLOCK, N))
  grid = M // BLOCK, N // BLOCK // tiling.columns

  def place(tile):
    row, column = kernel.snake(tile, *grid, tiling)
    return kernel.Place(row, column, row, column, 0, jnp.int32(K // BLOCK))

  out = jax.ShapeDtypeStruct((M, N), out_dtype)
  operands = a_MK, a_scale_JM, b_NK, b_scale
  return kernel.product(place, math.prod(grid), [], *operands, out, tiling)


def grouped_matmul(
  a_AK: jax.Array,
  a_scale_JA: jax.Array,
  b_ENK: jax.Array,
  b_scale_ENJ: jax.Array,
  load_E: jax.Array,
  *,
  out_dtype=jnp.bfloat16,
  tiling=None,
) -> jax.Array:
  """Multiplies every row by its expert's matrix: Fprop and Dgrad of Eq. 12.

  Args:
    a_AK: E4M3 rows, sorted by expert. Those of an expert begin at a multiple of
      128 (`first_block`); rows between its last and the next's first are zeros.
      A is a multiple of 128 and bounds what the experts need; rows past the
      block of the last are not read.
    a_scale_JA: of 1 x 128 values of a; finite where a is read.
    b_ENK: E4M3, a matrix an expert.
    b_scale_ENJ: of 128 x 128 values: [E, N / 128, K / 128].
    load_E: int32 rows of every expert.
    out_dtype: bfloat16 or float32, in which the sums are.
    tiling: a `hopper_kernel.Tiling`, where not the one chosen by N.

  Returns:
    y_AN, zeros in rows that are no expert's.
  """
  from dsv3.ops import hopper_kernel as kernel

  (A, K), (E, N, _) = a_AK.shape, b_ENK.shape
  b, b_scale = b_ENK.reshape(E * N, K), b_scale_ENJ.reshape(-1, K // BLOCK)
  _check(a_AK, a_scale_JA, b, b_scale)
  tiling = tiling or _tiling(kernel, N, True)
  assert not tiling.pairs, "neighbouring rows may be of two experts"
  grid = A // BLOCK, N // BLOCK // tiling.columns

  def place(tile, expert_of_block):
    row, column = kernel.snake(tile, *grid, tiling)
    expert = expert_of_block[row]
    steps = jnp.where(expert < E, K // BLOCK, 0).astype(jnp.int32)
    b_row = jnp.minimum(expert, E - 1) * (N // BLOCK) + column
    return kernel.Place(row, b_row, row, column, 0, steps)

  out = jax.ShapeDtypeStruct((A, N), out_dtype)
  tables = [_expert_of_block(load_E, A // BLOCK)]
  operands = a_AK, a_scale_JA, b, b_scale
  return kernel.product(place, math.prod(grid), tables, *operands, out, tiling)


def grouped_wgrad(
  a_IA: jax.Array,
  a_scale_JI: jax.Array,
  b_OA: jax.Array,
  b_scale_JO: jax.Array,
  load_E: jax.Array,
  *,
  tiling=None,
) -> jax.Array:
  """Sums the outer products of each expert's rows: Wgrad of Eq. 12.

  Args:
    a_IA: E4M3 inputs of the experts' matrices, transposed; rows (here the last
      dim) lie as in `grouped_matmul`.
    a_scale_JI: of 128 rows of a column: [A / 128, I].
    b_OA: E4M3 gradients of their outputs, likewise.
    b_scale_JO: [A / 128, O].
    load_E: int32 rows of every expert.
    tiling: a `hopper_kernel.Tiling`, where not the one chosen here.

  Returns:
    dw_EIO in float32; an expert without rows has zeros.
  """
  from dsv3.ops import hopper_kernel as kernel

  _check(a_IA, a_scale_JI, b_OA, b_scale_JO)
  E, n_in, n_out = len(load_E), len(a_IA), len(b_OA)
  tiling = tiling or _tiling(kernel, n_out, False)
  grid = n_in // BLOCK, n_out // BLOCK // tiling.columns
  tiles = math.prod(grid)

  def place(tile, first_E, blocks_E):
    expert = lax.div(tile, tiles)
    row, column = kernel.snake(lax.rem(tile, tiles), *grid, tiling)
    y_row = expert * (n_in // BLOCK) + row
    blocks = first_E[expert], blocks_E[expert]
    return kernel.Place(row, column, y_row, column, *blocks)

  out = jax.ShapeDtypeStruct((E * n_in, n_out), jnp.float32)
  tables = [first_block(load_E), _blocks(load_E)]
  operands = a_IA, a_scale_JI, b_OA, b_scale_JO
  dw = kernel.product(place, E * tiles, tables, *operands, out, tiling)
  return dw.reshape(E, n_in, n_out)


def first_block(load_E: jax.Array) -> jax.Array:
  """The block of 128 rows at which each expert's rows begin.

  >>> first_block(jnp.array([1, 0, 129, 5], jnp.int32)).tolist()
  [0, 1, 1, 3]
  """
  blocks_E = _blocks(load_E)
  return jnp.cumsum(blocks_E) - blocks_E


def _blocks(load_E):
  return -(-load_E // BLOCK)


def _expert_of_block(load_E, n_blocks: int):
  """Of every block of rows; E for those past the last expert's."""
  end_E = jnp.cumsum(_blocks(load_E))
  past_BE = jnp.arange(n_blocks)[:, None] >= end_E
  return jnp.sum(past_BE, 1, dtype=jnp.int32)


def _tiling(kernel, N: int, by_block: bool):
  """256 columns if they fit: scales of columns take the registers of half."""
  if by_block and N % (2 * BLOCK) == 0:
    return kernel.Tiling()
  return kernel.Tiling(columns=1, stages=5)


def _check(a_MK, a_scale_JM, b_NK, b_scale) -> None:
  (M, K), N = a_MK.shape, len(b_NK)
  assert not (M % BLOCK or N % BLOCK or K % BLOCK), (M, N, K)
  chex.assert_shape(b_NK, (N, K))
  chex.assert_shape(a_scale_JM, (K // BLOCK, M))
  assert b_scale.shape in [(K // BLOCK, N), (N // BLOCK, K // BLOCK)], b_scale


# The same in plain JAX. On a GPU XLA finds FP8 products in these, too.


def plain_matmul(
  a_MK, a_scale_JM, b_NK, b_scale, *, out_dtype=jnp.bfloat16
) -> jax.Array:
  """`matmul` in plain JAX."""
  J = a_MK.shape[1] // BLOCK
  b_scale_JN = _by_column(b_NK, b_scale)
  sums = _promote(a_MK, a_scale_JM, b_NK, b_scale_JN, 0, J)
  return sums.astype(out_dtype)


def plain_grouped_matmul(
  a_AK, a_scale_JA, b_ENK, b_scale_ENJ, load_E, *, out_dtype=jnp.bfloat16
) -> jax.Array:
  """`grouped_matmul` in plain JAX, one block of rows after the other."""
  (A, K), E = a_AK.shape, len(load_E)

  def of_block(block):
    a_RK, a_scale_JR, expert = block
    b_NK, b_scale = (
      x[jnp.minimum(expert, E - 1)] for x in (b_ENK, b_scale_ENJ)
    )
    b_scale_JN = _by_column(b_NK, b_scale)
    steps = jnp.where(expert < E, K // BLOCK, 0)
    return _promote(a_RK, a_scale_JR, b_NK, b_scale_JN, 0, steps)

  rows = a_AK.reshape(-1, BLOCK, K)
  scales = a_scale_JA.reshape(K // BLOCK, -1, BLOCK).swapaxes(0, 1)
  blocks = rows, scales, _expert_of_block(load_E, A // BLOCK)
  return lax.map(of_block, blocks).reshape(A, -1).astype(out_dtype)


def plain_grouped_wgrad(
  a_IA, a_scale_JI, b_OA, b_scale_JO, load_E
) -> jax.Array:
  """`grouped_wgrad` in plain JAX, one expert after the other."""

  def of_expert(blocks):
    return _promote(a_IA, a_scale_JI, b_OA, b_scale_JO, *blocks)

  return lax.map(of_expert, (first_block(load_E), _blocks(load_E)))


def _by_column(b_NK, b_scale):
  """Scales [J, N], as they are or from those [N / 128, J] of 128 x 128."""
  N, K = b_NK.shape
  by_block = b_scale.shape == (N // BLOCK, K // BLOCK)
  return jnp.repeat(b_scale.T, BLOCK, 1) if by_block else b_scale


def _promote(a_MK, a_scale_JM, b_NK, b_scale_JN, first, steps):
  """Adds up scaled products of `steps` blocks of the contraction."""

  def add(j, sums):
    a, b = (
      lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, 1) for x in (a_MK, b_NK)
    )
    partial = lax.dot_general(
      a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return sums + partial * (a_scale_JM[j][:, None] * b_scale_JN[j])

  zeros = jnp.zeros((len(a_MK), len(b_NK)), jnp.float32)
  return lax.fori_loop(first, first + steps, add, zeros)
