"""The sum of a tensor core of 14 bits, term by term in Python (Sec. 3.5.2)."""

import math


def cut(x: float, largest: float) -> float:
  """x without what lies 14 bits and more below the largest."""
  if largest == 0:
    return 0.0
  unit = 2.0 ** (math.floor(math.log2(largest)) - 13)
  return math.trunc(x / unit) * unit


def dot(a, b, every: int | None) -> float:
  """a b, 32 products at a time; every `every` terms a partial sum moves out."""
  total, partial = 0.0, 0.0
  for start in range(0, len(a), 32):
    products = [float(x) * float(y) for x, y in zip(a, b)][start : start + 32]
    largest = max(abs(partial), *map(abs, products))
    found = cut(partial, largest) + sum(cut(p, largest) for p in products)
    partial = cut(found, abs(found))
    if every and (start + 32) % every == 0:
      total, partial = total + partial, 0.0
  return total + partial
