"""The FP8 kernel of Hopper, in Pallas Mosaic GPU: one mainloop for every product.

A core takes 128 rows and `columns` x 128 columns of the output at a time. One
warpgroup copies blocks of 128 of the contraction into a ring of `stages` in
shared memory; two others, of 64 rows each, multiply them on the tensor cores
and promote: every block's product starts from zero and is scaled and added to
float32 sums in registers (Sec. 3.3.2, Fig. 7b). While one of the two promotes,
the other keeps the tensor cores busy.

The products differ only in which rows of the operands make which tile of the
output: a function `place` says so, tile by tile, from integers in memory.

Pallas is imported with this module, so import it where a kernel is launched.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 128  # N_C of Sec. 3.3.2: the tile of a scale and the promotion interval
HALF = BLOCK // 2  # rows of a warpgroup: those of one wgmma instruction
CORES = 132  # of an H100 SXM or H200, where no device says

# JAX 0.12 takes `load(ref.at[i])` and `ref.transpose`; before it was as below.
_BEFORE_0_12 = "idx" in inspect.signature(plgpu.load).parameters


def _load(ref, index, layout):
  keywords = {"layout": layout, "optimized": False}
  if _BEFORE_0_12:
    return plgpu.load(ref, index, **keywords)
  return plgpu.load(ref.at[index], **keywords)


def _transpose(ref):
  if _BEFORE_0_12:
    return plgpu.transpose_ref(ref, (1, 0))
  return ref.transpose((1, 0))


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the kernel divides its work; every value gives the same result.

  columns: blocks of 128 columns of a tile. With 2 the rows are read half as
    often, and what bounds FP8 is reading: 128 x 256 x 128 takes 1,024 cycles of
    a core's tensor cores (8,192 FLOP each) and 48 KiB.
  stages: blocks of the contraction in shared memory at once (227 KiB in all).
  stripe: tiles in a row before the next row of tiles begins, so that cores at
    work together share operands in the L2 cache.
  pairs: two neighbouring cores take tiles one below the other and copy the
    columns' operand once for both, half each. Rows of tiles and the stripe must
    be even. Not measured, so not chosen.
  """

  columns: int = 2
  stages: int = 4
  stripe: int = 8
  pairs: bool = False


class Place(NamedTuple):
  """Where a tile is and what makes it, all counted in blocks of 128."""

  a_row: jax.Array
  b_row: jax.Array
  row: jax.Array  # of the output
  column: jax.Array
  first: jax.Array  # block of the contraction
  steps: jax.Array  # blocks of it; 0 gives a tile of zeros


def product(
  place: Callable[..., Place],
  n_tiles: int,
  tables: list[jax.Array],
  a_MK: jax.Array,
  a_scale_JM: jax.Array,
  b_NK: jax.Array,
  b_scale: jax.Array,
  out: jax.ShapeDtypeStruct,
  tiling: Tiling,
) -> jax.Array:
  """Runs the kernel: `place(tile, *tables)` for every tile of `out`.

  `b_scale` is [J, N], a scale for 1 x 128, or [N / 128, J], one for 128 x 128.
  """
  assert out.shape[1] % (tiling.columns * BLOCK) == 0, (out.shape, tiling)
  by_block = b_scale.shape == (len(b_NK) // BLOCK, a_MK.shape[1] // BLOCK)
  pipeline = functools.partial(_pipeline, tiling, by_block)
  cluster = 2 if tiling.pairs else 1

  def fp8_product(*refs):
    *table_refs, a, a_scale, b, b_scale, y = refs
    operands = (a, a_scale, b) if by_block else (a, a_scale, b, b_scale)

    def core(buffers, y_buffer):
      @plgpu.nd_loop((n_tiles // cluster,), collective_axes="core")
      def _(loop):
        tile = loop.index[0] * cluster + lax.axis_index("pair")
        at = place(tile, *table_refs)
        here = _rows_of(operands, at, tiling.columns)
        step = functools.partial(_step, at, b_scale if by_block else None)
        finish = functools.partial(_store, at, y, y_buffer)
        context = functools.partial(_from_zero, finish, tiling.columns)
        pipeline(step, context, at.first, at.steps)(*here, allocations=buffers)

    no = lambda *_: None  # buffers do not depend on what is done with them
    buffers = pipeline(no, no, 0, jnp.int32(0)).get_allocations(*operands)
    y_buffer = _shared((2, 2, HALF, _piece(out.dtype)), out.dtype)
    pl.run_scoped(core, buffers, y_buffer, collective_axes="warpgroup")
    plgpu.wait_smem_to_gmem(0)

  launch = plgpu.kernel(
    fp8_product,
    out_type=out,
    grid=(min(_cores(), n_tiles) // cluster,),
    grid_names=("core",),
    cluster=(cluster,),
    cluster_names=("pair",),
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )
  return launch(*tables, a_MK, a_scale_JM, b_NK, b_scale)


def snake(tile, n_rows: int, n_columns: int, tiling: Tiling):
  """The tile-th place, in blocks: stripes of rows, up and down by columns."""
  grid = n_rows, n_columns
  assert not (tiling.pairs and (n_rows % 2 or tiling.stripe % 2)), (
    grid,
    tiling,
  )
  row, column = plgpu.planar_snake(tile, grid, 0, tiling.stripe)
  return row, column * tiling.columns


def _cores() -> int:
  """Of the GPU at hand; none is where programs are compiled for another."""
  device = jax.devices()[0]
  return device.core_count if device.platform == "gpu" else CORES


def _layout(dtype) -> tuple:
  """128 bytes a row, swizzled: what the tensor cores and the copies read."""
  return (
    plgpu.TilingTransform((8, _piece(dtype))),
    plgpu.SwizzleTransform(128),
  )


def _piece(dtype) -> int:
  return 128 // jnp.dtype(dtype).itemsize


def _shared(shape, dtype):
  return plgpu.SMEM(shape, dtype, transforms=_layout(dtype))


def _rows_of(operands, at: Place, columns: int):
  """The operands' rows that make this tile, over the whole contraction."""
  a_rows = pl.ds(at.a_row * BLOCK, BLOCK)
  b_rows = pl.ds(at.b_row * BLOCK, columns * BLOCK)
  a, a_scale, b, *b_scale = operands
  here = [a.at[a_rows], a_scale.at[:, a_rows], b.at[b_rows]]
  return here + [scale.at[:, b_rows] for scale in b_scale]


def _pipeline(tiling: Tiling, by_block: bool, step, context, first, steps):
  """Copies of `steps` blocks of the contraction, under way while `step` runs."""
  block = lambda j: (0, first + j)
  scales = lambda j: (first + j, 0)
  spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
  transforms, width = _layout(jnp.float8_e4m3fn), tiling.columns * BLOCK
  shared = ("pair",) if tiling.pairs else ()
  specs = [
    spec((BLOCK, BLOCK), block, transforms=transforms),
    spec((1, BLOCK), scales),
    spec((width, BLOCK), block, transforms=transforms, collective_axes=shared),
    spec((1, width), scales),
  ]
  return plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(steps,),
    in_specs=specs[:3] if by_block else specs,
    max_concurrent_steps=tiling.stages,
    memory_registers=40,  # for H100, says its documentation
    wg_axis="warpgroup",
    num_compute_wgs=2,
    compute_context=context,
  )


def _step(at: Place, b_block_scale, index, a, a_scale, b, *rest):
  """Multiplies one block of the contraction, scales it and adds it."""
  *b_scale, sums = rest
  layout = plgpu.Layout.WGMMA
  rows = pl.ds(lax.axis_index("warpgroup") * HALF, HALF)
  a_scale = _load(a_scale, (0, rows), layout.reduce(1))
  promoted = []
  for i, total in enumerate(sums):
    columns = pl.ds(i * BLOCK, BLOCK)
    scale = a_scale
    if b_block_scale is not None:
      scale *= b_block_scale[at.b_row + i, at.first + index[0]]
    by_column = [_load(x, (0, columns), layout.reduce(0)) for x in b_scale]
    partial = _multiply(a.at[rows], b.at[columns])
    for column_scale in by_column:
      partial *= lax.broadcast_in_dim(column_scale, partial.shape, [1])
    scale = lax.broadcast_in_dim(scale, partial.shape, [0])
    promoted.append(total + partial * scale)
  return tuple(promoted)


def _multiply(a, b):
  def into(accumulator):
    plgpu.wgmma(accumulator, a, _transpose(b))
    return accumulator[...]  # waits

  return pl.run_scoped(into, plgpu.ACC((HALF, BLOCK), jnp.float32))


def _from_zero(finish, columns: int, run) -> None:
  zero = jnp.zeros((HALF, BLOCK), jnp.float32)
  zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
  finish(run((zero,) * columns))


def _store(at: Place, y, y_buffer, sums) -> None:
  """Writes a tile through shared memory, the copies under way two at a time."""
  half = lax.axis_index("warpgroup")
  rows = pl.ds(at.row * BLOCK + half * HALF, HALF)
  piece = _piece(y.dtype)
  for i, total in enumerate(sums):
    total = total.astype(y.dtype)
    for n, start in enumerate(range(0, BLOCK, piece)):
      buffer = y_buffer.at[half, n % 2]
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      buffer[...] = total[:, start : start + piece]
      plgpu.commit_smem()
      columns = pl.ds((at.column + i) * BLOCK + start, piece)
      plgpu.copy_smem_to_gmem(buffer, y.at[rows, columns])
