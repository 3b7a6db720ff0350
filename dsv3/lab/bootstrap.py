"""What a few paired runs can tell: an interval, a verdict, how many are needed.

Runs of one seed see the same text in the same order and begin with the same
weights, so their difference varies less than either does. The interval is of
the mean difference over seeds.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

RESAMPLES = 20_000  # where they are too many to be listed
_EXACT = 7  # up to so many differences their multisets are: 1716


class Interval(NamedTuple):
  """A mean and where it lies with the confidence asked for."""

  mean: float
  low: float
  high: float


def interval(
  differences: Sequence[float], confidence: float = 0.95
) -> Interval | None:
  """Bootstrap interval of a mean, stretched for few samples; None below two.

  Quantiles of the means of all resamples, exact up to seven differences. Those
  of n samples are too narrow by sqrt((n - 1) / n), and know nothing of how
  uncertain n samples leave the spread: at n = 3 a plain percentile interval of
  95% holds the true mean three times in four at best. So the distances from the
  mean are stretched by sqrt(n / (n - 1)) and by Student's quantile over the
  normal one (Hesterberg, arXiv 1411.5279, corrects for both, with other
  quantiles, of which three samples have no further ones).

  >>> found = interval([0.1, 0.2, 0.3])
  >>> [round(x, 3) for x in found]
  [0.2, -0.069, 0.469]
  """
  d = np.sort(np.asarray(differences, np.float64))  # in any order the same
  n = len(d)
  if n < 2:
    return None
  mean = float(d.mean())
  means, weights = _resampled(d)
  tail = (1 - confidence) / 2
  stretch = special.stdtrit(n - 1, 1 - tail) / special.ndtri(1 - tail)
  stretch *= math.sqrt(n / (n - 1))
  ends = [_quantile(means, weights, q) for q in (tail, 1 - tail)]
  low, high = (mean + stretch * (end - mean) for end in ends)
  return Interval(mean, float(low), float(high))


def _resampled(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means of resamples, sorted, and the probability of each."""
  n = len(d)
  if n <= _EXACT:
    means, ways = [], []
    for chosen in itertools.combinations_with_replacement(range(n), n):
      means.append(d[list(chosen)].mean())
      repeats = Counter(chosen).values()
      ways.append(
        math.factorial(n) / math.prod(math.factorial(r) for r in repeats)
      )
  else:
    chosen = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    means, ways = d[chosen].mean(-1), np.ones(RESAMPLES)
  order = np.argsort(means, kind="stable")
  ways = np.asarray(ways, np.float64)[order]
  return np.asarray(means)[order], ways / ways.sum()


def _quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
  """The least value with at least `q` of the weight at or below it."""
  at = np.searchsorted(np.cumsum(weights), q - 1e-12)
  return values[min(at, len(values) - 1)]


def verdict(found: Interval | None, *, lower_is_better: bool = True) -> str:
  """`better`, `worse` or `not separable`; without an interval there is none."""
  if found is None:
    return "no verdict"
  if found.low <= 0 <= found.high:
    return "not separable"
  return "better" if (found.high < 0) == lower_is_better else "worse"


def seeds_needed(
  differences: Sequence[float],
  effect: float,
  *,
  confidence: float = 0.95,
  power: float = 0.8,
) -> int | None:
  """Paired seeds to see `effect`, at the spread of these; None below two.

  The least n where Student's test of n differences finds a true one of that
  size with probability `power`, by the usual sum of two quantiles. As rough as
  the spread itself: of three seeds that is known to a factor of 0.5 to 6.

  >>> seeds_needed([0.00, 0.01, 0.02], 0.005)
  34
  """
  if len(differences) < 2:
    return None
  spread = float(np.std(differences, ddof=1))
  for n in range(2, 100_000):
    reach = special.stdtrit(n - 1, (1 + confidence) / 2)
    reach += special.stdtrit(n - 1, power)
    if reach * spread <= effect * math.sqrt(n):
      return n
  return 100_000
