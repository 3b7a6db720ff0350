"""Fine-grained quantisation: a scale for every tile, bit-defined (Sec. 3.3.2).

The same bits on every platform: only IEEE products, comparisons and rounding to
nearest are used, never a division, which compilers rewrite and accelerators
approximate (`reciprocal`). The oracle (`tests/oracle/fp8.py`) gives the same bits
in NumPy.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LEAST_AMAX = 1e-4  # released kernels clamp here: a tile of zeros has a scale


class Format(NamedTuple):
  """A floating-point format of few bits, without infinities in use."""

  mantissa: int  # explicit bits
  least_exponent: int  # of a normal number; below it the spacing stays
  largest: float
  dtype: str  # that holds every value of it


FORMATS = {
  "e4m3": Format(3, -6, 448.0, "float8_e4m3fn"),
  "e5m2": Format(2, -14, 57_344.0, "float8_e5m2"),
  # Sec. 3.3.3: no hardware has it; bfloat16 holds all of its values.
  "e5m6": Format(6, -14, 65_024.0, "bfloat16"),
}
SCALES = ("float32", "power2", "e8m0")


@dataclasses.dataclass(frozen=True)
class Operand:
  """How one operand of a matmul is quantised.

  The tile is of the last two dims, rows x columns; 0 is the whole of a dim.
  Scales: `float32` makes a tile's largest value the format's; `power2` rounds
  that scale up to a power of two (ue8m0 in DeepSeek's releases); `e8m0` is the
  OCP microscaling rule, whose largest values may saturate.
  """

  format: str
  tile: tuple[int, int]
  scale: str = "float32"

  def __str__(self):
    rows, columns = (n or "*" for n in self.tile)
    return f"{self.format} {rows}x{columns} {self.scale}"


def operand(text: str) -> Operand | None:
  """The Operand of a text, `FORMAT ROWSxCOLUMNS [SCALE]`; "bf16" is None.

  Raises ValueError for anything else.

  >>> operand("e4m3 1x128 power2")
  Operand(format='e4m3', tile=(1, 128), scale='power2')
  >>> str(operand("e5m2 *x*"))
  'e5m2 *x* float32'
  """
  words = text.split()
  if words == ["bf16"]:
    return None
  wanted = (
    "wanted bf16 or FORMAT ROWSxCOLUMNS [SCALE], of the formats "
    f"{', '.join(FORMATS)} and the scales {', '.join(SCALES)}"
  )
  sizes = words[1].split("x") if len(words) in (2, 3) else []
  ok = len(sizes) == 2 and all(n == "*" or n.isdecimal() for n in sizes)
  ok = ok and words[0] in FORMATS and all(w in SCALES for w in words[2:])
  if not ok or "0" in sizes:
    raise ValueError(f"found {text!r}, {wanted}")
  tile = tuple(0 if n == "*" else int(n) for n in sizes)
  return Operand(words[0], tile, *words[2:])


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["values", "scale"],
  meta_fields=["tile"],
)
@dataclasses.dataclass(frozen=True)
class Quantised:
  """Numbers of few bits and the scale of every tile: values times scale.

  Tiles are of the last dims; dims before them are a batch.
  """

  values: jax.Array  # in the format's dtype
  scale: jax.Array  # float32, one a tile
  tile: tuple[int, ...]  # no zeros

  def dequantise(self) -> jax.Array:
    """The numbers, float32."""
    return _by_tile(
      lambda x, scale: x.astype(jnp.float32) * scale,
      self.values,
      self.scale,
      self.tile,
    )

  @property
  def T(self) -> "Quantised":
    """The last two dims swapped; the same numbers, nothing is rounded."""
    swap = lambda x: jnp.swapaxes(x, -1, -2)
    tile = (*self.tile[:-2], self.tile[-1], self.tile[-2])
    return Quantised(swap(self.values), swap(self.scale), tile)


def quantise(
  x: jax.Array,
  how: Operand,
  *,
  panels: int = 0,
  scale: jax.Array | None = None,
  key: jax.Array | None = None,
) -> Quantised:
  """Scales every tile by its largest magnitude and rounds (Sec. 3.3.2).

  Departs: multiplies by the reciprocal of a scale, which is a multiple of 1 / 448
  in float32; the released kernels divide. The last bit of a scale may differ.

  Args:
    x: [..., I, O], or [..., I, P, O] with one panel dim: a tile lies within one
      panel. Sizes need not be multiples of the tile's.
    how: format, tile and scale.
    panels: dims between the tile's rows and columns.
    scale: of earlier steps (delayed scaling), for a tile that is the whole; None
      takes the tile's own amax, at once.
    key: random bits for stochastic rounding; None rounds to nearest, ties to
      even.

  Returns:
    Values that saturate and never overflow. NaN and infinity become NaN, and do
    not touch the scale of their neighbours.

  >>> q = quantise(jnp.array([[1.0, -4.0]]), Operand("e4m3", (1, 2)))
  >>> q.values.tolist(), q.dequantise().tolist()
  ([[112.0, -448.0]], [[1.0, -4.0]])
  """
  kind = FORMATS[how.format]
  tile = (how.tile[0], *(1,) * panels, how.tile[1])
  sizes = x.shape[-len(tile) :]
  tile = tuple(t or max(size, 1) for t, size in zip(tile, sizes))
  x = x.astype(jnp.float32)
  finite = jnp.isfinite(x)
  if scale is None:
    amax = tile_max(jnp.where(finite, jnp.abs(x), 0), tile)
    scale = scale_of(amax, how)
  scaled = _by_tile(lambda x, inverse: x * inverse, x, reciprocal(scale), tile)
  scaled = jnp.clip(scaled, -kind.largest, kind.largest)
  values = _round(jnp.where(finite, scaled, jnp.nan), kind, key)
  return Quantised(values, scale, tile)


def scale_of(amax: jax.Array, how: Operand) -> jax.Array:
  """The scale, a multiplier, of tiles with these largest magnitudes."""
  kind = FORMATS[how.format]
  amax = jnp.maximum(amax, LEAST_AMAX)
  if how.scale == "e8m0":
    return _floor_power2(amax) * 2.0 ** -math.floor(math.log2(kind.largest))
  scale = amax * np.float32(1 / kind.largest)
  return ceil_power2(scale) if how.scale == "power2" else scale


_EXPONENT, _MANTISSA = np.int32(0x7F800000), np.int32(0x007FFFFF)


def reciprocal(x: jax.Array) -> jax.Array:
  """1 / x rounded to nearest, of a normal float32 over 0 whose inverse is one.

  A CPU divides so; GPUs and TPUs approximate, and have a long division here.

  >>> reciprocal(jnp.array([0.25, 3.0])).tolist()
  [4.0, 0.3333333432674408]
  """
  return lax.platform_dependent(x, cpu=lambda x: 1 / x, default=long_division)


def long_division(x: jax.Array) -> jax.Array:
  """`reciprocal` in integers: 25 bits of 1 / m by shifting and subtracting.

  With x = m 2^e and m in (1, 2) the mantissa of 1 / x is 2 / m, its exponent
  -e - 1. No 1 / m lies halfway between two float32, so a bit more than a mantissa
  has says where to round.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  exponent, fraction = (bits & _EXPONENT) >> 23, bits & _MANTISSA
  divisor = fraction | 1 << 23
  quotient, rest = jnp.zeros_like(bits), jnp.full_like(bits, 1 << 23)
  for _ in range(25):  # quotient = 2^25 / m
    rest = rest << 1
    bit = (rest >= divisor).astype(jnp.int32)
    quotient, rest = quotient << 1 | bit, rest - bit * divisor
  mantissa = (
    quotient + 1
  ) >> 1  # 24 bits, rounded; may carry into the exponent
  inverse = ((253 - exponent) << 23) + mantissa - (1 << 23)
  power2 = (254 - exponent) << 23
  inverse = jnp.where(fraction == 0, power2, inverse)
  return lax.bitcast_convert_type(inverse, jnp.float32)


def _floor_power2(x):
  bits = lax.bitcast_convert_type(x, jnp.int32) & _EXPONENT
  return lax.bitcast_convert_type(bits, jnp.float32)


def ceil_power2(x: jax.Array) -> jax.Array:
  """The least power of two that is not under x, a normal float32 over 0.

  >>> ceil_power2(jnp.array([1.0, 1.1, 0.25])).tolist()
  [1.0, 2.0, 0.25]
  """
  bits = lax.bitcast_convert_type(x, jnp.int32) + _MANTISSA
  return lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)


def _round(x, kind: Format, key):
  """x, float32 within the format's range, to the format."""
  if key is None and kind.dtype.startswith("float8"):
    return x.astype(kind.dtype)
  least = np.float32(2.0**kind.least_exponent)
  spacing = jnp.maximum(_floor_power2(jnp.abs(x)), least)
  spacing *= np.float32(2.0**-kind.mantissa)
  steps = x / spacing  # exact, by a power of two
  if key is None:
    steps = jnp.round(steps)
  else:  # up with the probability of what is cut off
    # 24 bits: a float32 in [0, 1) that is never rounded up to 1.
    bits = jax.random.bits(key, x.shape, jnp.uint32) >> 8
    steps = jnp.floor(steps + bits.astype(jnp.float32) * np.float32(2**-24))
  x = jnp.clip(steps * spacing, -kind.largest, kind.largest)
  return x.astype(kind.dtype)


def _split(x, tile):
  """[..., a, b] as [..., a / t, t, b / u, u], zeros beyond the edges."""
  batch = x.ndim - len(tile)
  blocks = [-(-size // t) for size, t in zip(x.shape[batch:], tile)]
  beyond = [n * t - size for n, t, size in zip(blocks, tile, x.shape[batch:])]
  if any(beyond):
    x = jnp.pad(x, [(0, 0)] * batch + [(0, n) for n in beyond])
  pairs = [size for pair in zip(blocks, tile) for size in pair]
  return x.reshape(*x.shape[:batch], *pairs)


def _inside(batch, tile):
  """The dims within a tile, of what `_split` returns."""
  return tuple(batch + 2 * i + 1 for i in range(len(tile)))


def tile_max(x: jax.Array, tile: tuple[int, ...]) -> jax.Array:
  """The largest of every tile, in the shape of their scales."""
  return _split(x, tile).max(_inside(x.ndim - len(tile), tile))


def _by_tile(function, x, scale, tile):
  """function(x, scale of its tile), elementwise."""
  batch = x.ndim - len(tile)
  parts = _split(x, tile)
  parts = function(parts, jnp.expand_dims(scale, _inside(batch, tile)))
  whole = parts.reshape(
    *x.shape[:batch], *(n * t for n, t in zip(scale.shape[batch:], tile))
  )
  return whole[tuple(slice(size) for size in x.shape)]
