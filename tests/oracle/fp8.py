"""Fine-grained quantisation in slow NumPy (Sec. 3.3.2), bit for bit.

Formats are lists of all their values; rounding is a search for the nearest.
"""

import numpy as np

F32 = np.float32


def magnitudes(exponent_bits: int, mantissa_bits: int, largest: float):
  """All magnitudes of a format that has no infinity in use, ascending."""
  bias = 2 ** (exponent_bits - 1) - 1
  found = [0.0]
  for exponent in range(2**exponent_bits):
    for mantissa in range(2**mantissa_bits):
      fraction = mantissa / 2**mantissa_bits
      if exponent == 0:
        found.append(fraction * 2.0 ** (1 - bias))
      else:
        found.append((1 + fraction) * 2.0 ** (exponent - bias))
  return np.unique([m for m in found if m <= largest])


TABLES = {
  "e4m3": magnitudes(4, 3, 448.0),
  "e5m2": magnitudes(5, 2, 57344.0),
  "e5m6": magnitudes(5, 6, 65024.0),
}


def nearest(x, table):
  """The value of the table nearest to x, ties to the even one, saturating."""
  magnitude = np.abs(x.astype(np.float64))
  above = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
  low, high = table[above - 1], table[above]
  to_high = (magnitude - low > high - magnitude) | (
    (magnitude - low == high - magnitude) & (above % 2 == 0)
  )
  return np.copysign(np.where(to_high, high, low), x).astype(F32)


def scale_of(amax, table, kind):
  amax = np.maximum(amax, F32(1e-4))
  if kind == "e8m0":
    largest = np.floor(np.log2(table[-1]))
    return F32(2.0 ** (np.floor(np.log2(np.float64(amax))) - largest))
  scale = amax * F32(1 / table[-1])
  if kind == "power2":
    return F32(2.0 ** np.ceil(np.log2(np.float64(scale))))
  return scale


def quantise(x, form, tile, kind):
  """Values and scales of a matrix, tile by tile; float32 both."""
  table = TABLES[form]
  rows, columns = x.shape
  r, c = tile[0] or rows, tile[1] or columns
  values = np.zeros(x.shape, F32)
  scales = np.zeros((-(-rows // r), -(-columns // c)), F32)
  for i in range(0, rows, r):
    for j in range(0, columns, c):
      part = x[i : i + r, j : j + c].astype(F32)
      good = np.isfinite(part)
      amax = F32(max(np.abs(part[good]), default=0))
      scale = scale_of(amax, table, kind)
      scaled = np.where(good, part, 0) * (F32(1) / scale)
      rounded = nearest(np.clip(scaled, -table[-1], table[-1]), table)
      values[i : i + r, j : j + c] = np.where(good, rounded, np.nan)
      scales[i // r, j // c] = scale
  return values, scales


def dequantise(values, scales, tile):
  r, c = (t or n for t, n in zip(tile, values.shape))
  whole = np.repeat(np.repeat(scales, r, 0), c, 1)
  return values * whole[: values.shape[0], : values.shape[1]]


def matmul(a, b):
  """The product of dequantised operands, float64 sums."""
  return a.astype(np.float64) @ b.astype(np.float64)
