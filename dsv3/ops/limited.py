"""How Hopper's tensor cores add: sums of 32 products, cut to 14 bits.

Before it adds, the hardware shifts all summands to the largest one's exponent
and keeps 14 bits of each (Sec. 3.5.2). A model of that, for ablations on any
machine: slow, and exact in what it says.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3.ops import aligned
from dsv3.ops.fp8 import Quantised
from dsv3.ops.products import Matrix, Products

TERMS = 32  # products that one FP8 instruction adds at once (K of WGMMA)
FRACTION = 13  # bits kept below the largest exponent (arXiv 2505.09343, 3.1.1)
PROMOTED = 128  # N_C of Sec. 3.3.2: terms before a sum moves to float32
_ROWS = 64  # of a at once: the memory is rows x rows of b x TERMS


def matmul(
  a_MK: jax.Array,
  b_NK: jax.Array,
  scale_a_MK: jax.Array | None = None,
  scale_b_NK: jax.Array | None = None,
  *,
  every: int | None,
) -> jax.Array:
  """a b' with sums of 14 bits, moved to float32 every `every` terms.

  Args:
    a_MK, b_NK: float32 values whose products are exact in float32, as those of
      FP8 numbers are.
    scale_a_MK, scale_b_NK: scales, the same within each `every` terms; they
      multiply a sum as it moves.
    every: terms between two moves; None moves at the end alone.

  >>> a = jnp.array([[2.0**14, 1.0, 1.0]])
  >>> matmul(a, jnp.ones((1, 3)), every=None).tolist()  # the ones are cut off
  [[16384.0]]
  """
  every = every or -(-a_MK.shape[1] // TERMS) * TERMS
  assert every % TERMS == 0, every
  n_rows = len(a_MK)
  wide = lambda x, fill: jnp.pad(
    x, ((0, 0), (0, -x.shape[1] % every)), constant_values=fill
  )
  moves = lambda scale, x: (
    jnp.ones((len(x), -(-x.shape[1] // every)), jnp.float32)
    if scale is None
    else wide(scale, 1)[:, ::every]
  )
  scale_a_MS, scale_b_NS = moves(scale_a_MK, a_MK), moves(scale_b_NK, b_NK)
  tall = lambda x: jnp.pad(x, ((0, -n_rows % _ROWS), (0, 0)))
  a_MK, scale_a_MS = tall(wide(a_MK, 0)), tall(scale_a_MS)
  b_SJNK = _parts(wide(b_NK, 0), every)

  def of_rows(block):
    a_RK, scale_a_RS = block

    def window(total_RN, part):
      a_JRK, b_JNK, scale_a_R, scale_b_N = part
      partial_RN, _ = lax.scan(_add, jnp.zeros_like(total_RN), (a_JRK, b_JNK))
      return total_RN + partial_RN * scale_a_R[:, None] * scale_b_N, None

    parts = _parts(a_RK, every), b_SJNK, scale_a_RS.T, scale_b_NS.T
    zero_RN = jnp.zeros((len(a_RK), len(b_NK)), jnp.float32)
    return lax.scan(window, zero_RN, parts)[0]

  blocks = jax.tree.map(
    lambda x: x.reshape(-1, _ROWS, x.shape[1]), (a_MK, scale_a_MS)
  )
  return lax.map(of_rows, blocks).reshape(-1, len(b_NK))[:n_rows]


def _parts(x_RK, every):
  """[windows, instructions, rows, TERMS]."""
  x = x_RK.reshape(len(x_RK), -1, every // TERMS, TERMS)
  return jnp.moveaxis(x, 0, 2)


def _add(sum_RN, part):
  """sum + 32 products, each cut to 14 bits of the largest, and the sum again."""
  a_RK, b_NK = part
  products_RNK = a_RK[:, None] * b_NK
  largest = jnp.maximum(jnp.abs(sum_RN), jnp.abs(products_RNK).max(-1))
  unit = _unit(largest)
  found = _cut(sum_RN, unit) + _cut(products_RNK, unit[..., None]).sum(-1)
  return _cut(found, _unit(jnp.abs(found))), None


def _cut(x, unit):
  return jnp.trunc(x / unit) * unit


def _unit(x):
  """The weight of the last bit that is kept of numbers up to x."""
  bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7F800000)
  power = lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.maximum(power, np.float32(2.0**-100)) * np.float32(2.0**-FRACTION)


@dataclasses.dataclass(frozen=True)
class LimitedProducts(Products):
  """Products summed as Hopper sums them; operands that stay high are not.

  The sum over blocks of an expert's rows (Wgrad) is in float32 throughout.
  """

  promoted: bool = True

  def fprop(self, x_MI: Matrix, w_IPO: Matrix, load_E=None) -> jax.Array:
    if not _both(x_MI, w_IPO):
      return super().fprop(x_MI, w_IPO, load_E)
    every = self._every(x_MI.tile[-1], w_IPO.tile[-3])
    turned = lambda w: jnp.moveaxis(w, -3, -1).reshape(
      *w.shape[:-3], -1, w.shape[-3]
    )
    b = _elements(w_IPO, turned)
    y_MN = self._rows(_elements(x_MI), b, load_E, every)
    return y_MN.reshape(len(y_MN), *w_IPO.values.shape[-2:])

  def dgrad(self, g_MPO: Matrix, w_IPO: Matrix, load_E=None) -> jax.Array:
    if not _both(g_MPO, w_IPO):
      return super().dgrad(g_MPO, w_IPO, load_E)
    every = self._every(g_MPO.tile[-1], w_IPO.tile[-1])
    if every is None:  # a sum for each panel, whose scale is its own
      panels = range(g_MPO.values.shape[-2])
      parts = [
        [_elements(_panel(q, p)) for q in (g_MPO, w_IPO)] for p in panels
      ]
      return sum(self._rows(a, b, load_E, every) for a, b in parts)
    beside = lambda fill: lambda x: _beside(x, every, fill)
    a, b = (_elements(q, beside(0), beside(1)) for q in (g_MPO, w_IPO))
    return self._rows(a, b, load_E, every)

  def wgrad(self, x_MI: Matrix, g_MPO: Matrix, load_E=None) -> jax.Array:
    if not _both(x_MI, g_MPO):
      return super().wgrad(x_MI, g_MPO, load_E)
    every = self._every(x_MI.tile[0], g_MPO.tile[0])
    across = lambda x: x.reshape(len(x), -1).T
    a, b = _elements(x_MI, across), _elements(g_MPO, across)
    if load_E is None:
      dw_IN = matmul(a[0], b[0], a[1], b[1], every=every)
      return dw_IN.reshape(len(dw_IN), *g_MPO.values.shape[-2:])
    places = aligned.align(load_E, a[0].shape[1])
    blocks = lambda x_KA: aligned.blocks(x_KA.T, places).swapaxes(1, 2)

    def add(dw_EIN, block):
      a, b, expert = block
      part_IN = matmul(a[0], b[0], a[1], b[1], every=every)
      return dw_EIN.at[expert].add(part_IN), None

    shape = (len(load_E), len(a[0]), len(b[0]))
    parts = (*jax.tree.map(blocks, (a, b)), places.expert_B)
    dw_EIN = lax.scan(add, jnp.zeros(shape, jnp.float32), parts)[0]
    return dw_EIN.reshape(*shape[:2], *g_MPO.values.shape[-2:])

  def _every(self, *tile_dims: int) -> int | None:
    """Terms between two moves: N_C, or the smaller tile of a scale."""
    if not self.promoted:
      return None
    return max(TERMS, min(PROMOTED, *tile_dims) // TERMS * TERMS)

  def _rows(self, a, b, load_E, every):
    """Rows of a times those of b, or of the b of their expert."""
    if load_E is None:
      return matmul(a[0], b[0], a[1], b[1], every=every)
    places = aligned.align(load_E, len(a[0]))

    def of_block(block):
      a, expert = block
      value_NK, scale_NK = (x_ENK[expert] for x_ENK in b)
      return matmul(a[0], value_NK, a[1], scale_NK, every=every)

    parts = jax.tree.map(lambda x: aligned.blocks(x, places), a)
    y_BRN = lax.map(of_block, (parts, places.expert_B))
    return aligned.gather(y_BRN.reshape(-1, y_BRN.shape[-1]), places)


def moves(*tile_dims: int) -> bool:
  """Can sums be promoted between tiles of these lengths? 0 is a whole dim.

  >>> moves(128, 0), moves(32, 96), moves(16, 128), moves(192, 192)
  (True, True, False, False)
  """
  lengths = [n for n in tile_dims if n]
  every = min(PROMOTED, *lengths) if lengths else PROMOTED
  return every % TERMS == 0 and all(n % every == 0 for n in lengths)


def _panel(q: Quantised, p: int) -> Quantised:
  """One panel of an operand [..., P, O], without its dim."""
  at = lambda x: x[..., p, :]
  return Quantised(at(q.values), at(q.scale), (*q.tile[:-2], q.tile[-1]))


def _both(*operands: Matrix) -> bool:
  return all(isinstance(a, Quantised) for a in operands)


def _elements(q: Quantised, turn=lambda x: x, turn_scale=None):
  """Values and, element by element, their scales; float32."""
  ones = dataclasses.replace(q, values=jnp.ones_like(q.values, jnp.float32))
  turn_scale = turn_scale or turn
  return turn(q.values.astype(jnp.float32)), turn_scale(ones.dequantise())


def _beside(x, every, fill):
  """[..., P, O] as [..., P x O], every panel filled up to whole moves."""
  beyond = -x.shape[-1] % every
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, beyond)], constant_values=fill)
  return x.reshape(*x.shape[:-2], -1)
