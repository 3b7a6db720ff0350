"""Rotary embedding on interleaved pairs, and YaRN (Sec. 4.3).

`rope` is the config's group: theta, yarn_factor, original_len, beta_fast,
beta_slow, mscale. YaRN holds where yarn_factor is over 1.
"""

import math

import numpy as np


def frequencies(rope_dim, rope):
  """Radians a position turns each pair of channels by, [R / 2]."""
  plain = [rope["theta"] ** (-2 * i / rope_dim) for i in range(rope_dim // 2)]
  if rope["yarn_factor"] <= 1:
    return np.array(plain)
  low, high = yarn_range(rope_dim, rope)
  mixed = []
  for i, frequency in enumerate(plain):
    ramp = min(max((i - low) / (high - low), 0), 1)
    slowed = frequency / rope["yarn_factor"]
    mixed.append(slowed * ramp + frequency * (1 - ramp))
  return np.array(mixed)


def yarn_range(rope_dim, rope):
  """The pairs between which YaRN goes from no slowing to full slowing.

  A pair that turns beta_fast times or more within the original length keeps
  its frequency; one that turns beta_slow times or less is slowed in full.
  """

  def pair_with(turns):
    wave = rope["original_len"] / (turns * 2 * math.pi)
    return rope_dim * math.log(wave) / (2 * math.log(rope["theta"]))

  low = max(math.floor(pair_with(rope["beta_fast"])), 0)
  high = min(math.ceil(pair_with(rope["beta_slow"])), rope_dim - 1)
  # The released code's guard against a division by zero.
  return low, high if high != low else high + 0.001


def yarn_mscale(rope):
  """sqrt(t) = 0.1 mscale ln(s) + 1 (Sec. 4.3)."""
  if rope["yarn_factor"] <= 1:
    return 1.0
  return 0.1 * rope["mscale"] * math.log(rope["yarn_factor"]) + 1


def softmax_scale(head_dim, rope):
  """1 / sqrt(d_h + d_h^R) of Eq. 10, times YaRN's temperature."""
  return yarn_mscale(rope) ** 2 / math.sqrt(head_dim)


def rotate(x_R, position, frequencies_R2):
  """Turns the pairs (x0, x1), (x2, x3), ... of one vector."""
  out_R = np.zeros_like(x_R)
  for i, frequency in enumerate(frequencies_R2):
    cos = math.cos(position * frequency)
    sin = math.sin(position * frequency)
    a, b = x_R[2 * i], x_R[2 * i + 1]
    out_R[2 * i] = a * cos - b * sin
    out_R[2 * i + 1] = a * sin + b * cos
  return out_R
