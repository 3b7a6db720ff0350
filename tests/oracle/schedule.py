"""The schedules of Sec. 4.2, with the report's numbers.

`step` counts optimiser steps from 0, `tokens` those seen before the step.
"""

import math

T, B = 1e12, 1e9


def learning_rate(step, tokens):
  """Warm-up, constant to 10T, cosine over 4.3T, then two constants."""
  peak, end, last = 2.2e-4, 2.2e-5, 7.3e-6
  if step < 2000:
    return peak * step / 2000
  if tokens < 10 * T:
    return peak
  if tokens < 14.3 * T:
    share = (tokens - 10 * T) / (4.3 * T)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2
  return end if tokens < 14.3 * T + 333 * B else last


def batch_size(tokens, stages):
  """Sequences of a step: 3072 to 15360 over 469B tokens, in equal stairs.

  The report only says "gradually"; the stairs and their number are ours.
  """
  stair = min(math.floor(tokens / (469 * B) * stages), stages)
  return 3072 + (15360 - 3072) * stair // stages


def mtp_weight(tokens):
  """lambda: 0.3 for the first 10T tokens, then 0.1."""
  return 0.3 if tokens < 10 * T else 0.1


def bias_speed(tokens):
  """gamma: 0.001 for the first 14.3T tokens, then 0."""
  return 0.001 if tokens < 14.3 * T else 0.0


BALANCE_WEIGHT = 1e-4  # alpha
