"""The interval holds what it should as often as it says; cases by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dsv3.lab import bootstrap


def test_three_differences_by_hand():
  """27 resamples: the lowest mean has 1/27 > 2.5% of them, so it is the end.

  Its distance 0.1 to the mean is stretched by sqrt(3 / 2) and by 4.30265 over
  1.95996, Student's quantile of two degrees over the normal one.
  """
  found = bootstrap.interval([0.1, 0.2, 0.3])
  reach = 0.1 * math.sqrt(1.5) * 4.302653 / 1.959964
  assert found.mean == pytest.approx(0.2)
  assert found.low == pytest.approx(0.2 - reach, abs=1e-6)
  assert found.high == pytest.approx(0.2 + reach, abs=1e-6)


def test_two_differences_reach_seventeen_times_as_far_as_they_lie():
  found = bootstrap.interval([-0.1, 0.1])
  stretch = math.sqrt(2) * 12.706205 / 1.959964
  assert found.high == pytest.approx(0.1 * stretch, abs=1e-6)
  assert found.low == -found.high


def test_one_difference_has_no_interval():
  assert bootstrap.interval([0.3]) is None
  assert bootstrap.verdict(None) == "no verdict"
  assert bootstrap.seeds_needed([0.3], 0.005) is None


@pytest.mark.parametrize(
  "n, trials", [(2, 3000), (3, 3000), (5, 800), (12, 150)]
)
def test_the_interval_holds_the_true_mean_as_often_as_it_says(n, trials):
  """95% of normal samples, as many of them as ablations have seeds.

  A plain percentile interval holds it in 3 of 4 at n = 3. Four standard errors
  of the count, and a percent and a half for what the stretch leaves.
  """
  rng = np.random.default_rng(n)
  held = 0
  for sample in rng.normal(0.7, 2.0, (trials, n)):
    found = bootstrap.interval(sample)
    held += found.low <= 0.7 <= found.high
  error = 4 * math.sqrt(0.95 * 0.05 / trials) + 0.015
  assert held / trials == pytest.approx(0.95, abs=error)


def test_listed_resamples_are_those_that_are_drawn(monkeypatch):
  sample = np.random.default_rng(0).normal(size=6)
  exact = bootstrap.interval(sample)
  monkeypatch.setattr(bootstrap, "_EXACT", 1)
  drawn = bootstrap.interval(sample)
  assert np.allclose(exact, drawn, atol=0.03)
  assert exact.mean == drawn.mean


@pytest.mark.parametrize("n", [3, 9])
def test_the_interval_does_not_hang_on_the_order_of_the_pairs(n):
  sample = np.random.default_rng(0).normal(size=n)
  assert bootstrap.interval(sample) == bootstrap.interval(sample[::-1])


@pytest.mark.parametrize(
  "low, high, lower, higher",
  [
    (-0.2, -0.1, "better", "worse"),
    (0.1, 0.2, "worse", "better"),
    (-0.1, 0.2, "not separable", "not separable"),
    (0.0, 0.0, "not separable", "not separable"),
  ],
)
def test_a_verdict_takes_an_interval_without_zero(low, high, lower, higher):
  found = bootstrap.Interval((low + high) / 2, low, high)
  assert bootstrap.verdict(found) == lower
  assert bootstrap.verdict(found, lower_is_better=False) == higher


def test_the_seeds_that_are_needed_find_the_effect_four_times_in_five():
  """By Student's test on samples with the spread of the pilot."""
  pilot = [0.0, 0.01, 0.02]  # standard deviation 0.01
  n = bootstrap.seeds_needed(pilot, 0.005)
  assert n == 34  # by the tables: (2.0345 + 0.8530) 0.01 / sqrt(34) <= 0.005
  samples = np.random.default_rng(0).normal(0.005, 0.01, (4000, n))
  found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
  assert found.mean() == pytest.approx(0.8, abs=0.03)
  assert bootstrap.seeds_needed([0.02, 0.02, 0.02], 0.005) == 2
