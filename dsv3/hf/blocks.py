"""FP8 weights in blocks of 128 x 128, each with a scale that multiplies.

The format of the released weights (their README): w = fp8 * scale_inv of the
block, E4M3, edges padded to a whole block. NumPy, for weights on a disk; the
quantisers of training are another matter.
"""

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3 = ml_dtypes.float8_e4m3fn
LARGEST = 448.0  # of E4M3
LOWEST_AMAX = 1e-4  # of a block, as in the release's recipe


def dequantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """The weights as float32 [out, in].

  >>> one = np.ones((2, 3), E4M3)
  >>> dequantize(one, np.full((1, 1), 0.5, np.float32)).tolist()
  [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
  """
  out = weight.astype(np.float32)
  _multiply(out, scale.astype(np.float32))
  return out


def quantize(
  weight: np.ndarray,
  scale: np.ndarray | None = None,
  *,
  power_of_two: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """FP8 weights and their scales from float32 or bfloat16 [out, in].

  Args:
    scale: what the blocks were scaled with when they were read. A block that
      it gives back exactly keeps it: unchanged weights come out byte for byte.
    power_of_two: scales of new blocks are rounded up to one (ue8m0).
  """
  exact = weight.astype(np.float32)
  amax = np.maximum(_amax(exact), LOWEST_AMAX)
  new = (amax / np.float32(LARGEST)).astype(np.float32)
  if power_of_two:
    new = np.exp2(np.ceil(np.log2(new))).astype(np.float32)
  if scale is not None:
    kept = _divide(exact, scale)
    back = dequantize(kept, scale)
    short = back.astype(ml_dtypes.bfloat16).astype(np.float32)
    # A float32 weight may have been bfloat16 on its way, too.
    same = [short] if weight.dtype == ml_dtypes.bfloat16 else [back, short]
    unchanged = np.minimum.reduce([_amax(np.abs(x - exact)) for x in same]) == 0
    if unchanged.all():
      return kept, scale
    new = np.where(unchanged, scale, new)
  return _divide(exact, new), new


def _divide(exact: np.ndarray, scale: np.ndarray) -> np.ndarray:
  out = np.empty(exact.shape, E4M3)
  for i, rows in _bands(exact):
    scaled = exact[rows] / _row(scale[i], exact)
    out[rows] = np.clip(scaled, -LARGEST, LARGEST).astype(E4M3)
  return out


def _multiply(out: np.ndarray, scale: np.ndarray) -> None:
  for i, rows in _bands(out):
    out[rows] *= _row(scale[i], out)


def _amax(x: np.ndarray) -> np.ndarray:
  starts = np.arange(0, x.shape[1], BLOCK)
  bands = [np.abs(x[rows]).max(axis=0) for _, rows in _bands(x)]
  return np.stack([np.maximum.reduceat(band, starts) for band in bands])


def _bands(x: np.ndarray):
  """Block rows: their number, and the rows of the matrix."""
  for i in range(-(-len(x) // BLOCK)):
    yield i, slice(i * BLOCK, (i + 1) * BLOCK)


def _row(scale: np.ndarray, like: np.ndarray) -> np.ndarray:
  """A block row's scales, one for every column."""
  return np.repeat(scale, BLOCK)[: like.shape[1]]
