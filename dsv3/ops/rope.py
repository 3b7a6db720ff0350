"""Rotary position embedding in interleaved pairs, and YaRN (Sec. 2.1.1, 4.3).

A head's rotated dims are the pairs (0, 1), (2, 3), ...: the order of the
released weights. The half-split order of other codebases is a permutation of
it and does not fit those weights.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(rope_dim: int, theta: float = 10_000.0) -> np.ndarray:
  """Rotation speed of every pair of dims, in radians a position.

  >>> frequencies(4)
  array([1.  , 0.01], dtype=float32)
  """
  exponents = np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim
  return (theta**-exponents).astype(np.float32)


def yarn_frequencies(
  rope_dim: int,
  theta: float,
  factor: float,
  original_len: int,
  beta_fast: float,
  beta_slow: float,
) -> np.ndarray:
  """Frequencies for a context `factor` times as long (Sec. 4.3, YaRN).

  Pairs that turn more than beta_fast times within `original_len` positions
  keep their speed, those that turn less than beta_slow times are slowed by
  `factor`, and a linear ramp over the pair's index joins them.

  >>> round(float(yarn_frequencies(64, 1e4, 40.0, 4096, 32.0, 1.0)[16]), 8)
  0.0055
  """

  def pair_that_turns(times: float) -> float:
    wavelength = original_len / (times * 2 * math.pi)
    return rope_dim * math.log(wavelength) / (2 * math.log(theta))

  low = max(math.floor(pair_that_turns(beta_fast)), 0)
  high = min(math.ceil(pair_that_turns(beta_slow)), rope_dim - 1)
  ramp = (np.arange(rope_dim // 2) - low) / max(high - low, 1e-3)
  slowed = np.clip(ramp, 0.0, 1.0)
  plain = frequencies(rope_dim, theta).astype(np.float64)
  return (plain / factor * slowed + plain * (1 - slowed)).astype(np.float32)


def softmax_scale(
  head_dim: int, factor: float = 1.0, mscale: float = 1.0
) -> float:
  """Scale of the attention logits (Eq. 10), raised by YaRN (Sec. 4.3).

  YaRN's sqrt(t) = 0.1 mscale ln(factor) + 1 multiplies queries and keys, so
  its square multiplies the whole logit, content part included.

  >>> round(softmax_scale(192, 40.0), 10)
  0.1352337789
  """
  sqrt_t = 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
  return head_dim**-0.5 * sqrt_t**2


def rotate(
  x_BLHR: jax.Array,
  frequencies_R: np.ndarray,
  positions_L: jax.Array | None = None,
) -> jax.Array:
  """RoPE(.) of Eq. 3 and 8: turns pair r at position l by l * frequency r.

  Computed in float32, returned in the type of `x_BLHR`. `frequencies_R` has
  R / 2 entries; `positions_L` is [L] for all sequences or [B, L], None 0 .. L-1.

  >>> x = jnp.ones((1, 2, 1, 2))
  >>> rotate(x, np.array([jnp.pi / 2]))[0, 1, 0].round(3).tolist()
  [-1.0, 1.0]
  """
  pairs = x_BLHR.astype(jnp.float32).reshape(*x_BLHR.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  if positions_L is None:
    positions_L = jnp.arange(x_BLHR.shape[1])
  positions_L1 = positions_L.astype(jnp.float32)[..., None]
  angle_L1R = (positions_L1 * frequencies_R)[..., None, :]
  cos, sin = jnp.cos(angle_L1R), jnp.sin(angle_L1R)
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
  return turned.reshape(x_BLHR.shape).astype(x_BLHR.dtype)
