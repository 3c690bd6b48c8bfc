"""Intervals against scipy's own tests of pairs, and the three verdicts."""

import math

import numpy as np
import pytest
from scipy import stats

from qat.run import claims


def two(n, seed):
  rng = np.random.default_rng(seed)
  return rng.normal(10, 1, n), rng.normal(9, 1, n)


@pytest.mark.parametrize('n', (2, 3, 5, 20))
def test_a_difference_has_the_interval_of_the_paired_t_test(n):
  first, second = two(n, n)
  want = stats.ttest_rel(first, second).confidence_interval(0.95)
  found = claims.difference(first, second)
  assert found.value == pytest.approx((first - second).mean(), abs=1e-7)
  assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=1e-7)


def test_a_ratio_is_of_geometric_means_and_its_interval_that_of_the_logs():
  first, second = two(4, 1)
  want = stats.ttest_rel(np.log(first), np.log(second)).confidence_interval(0.95)
  found = claims.ratio(first, second)
  assert found.value == pytest.approx(stats.gmean(first) / stats.gmean(second), abs=1e-7)
  assert (found.low, found.high) == pytest.approx((math.exp(want.low), math.exp(want.high)), abs=1e-7)


def test_intervals_cover_what_they_should():
  """Of 400 sets of 3 seeds about 95 % have the true difference, 1, in their interval; in a bootstrap's, 75 % do."""
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(400):
    shared = rng.normal(0, 5, 3)  # a seed that is good for one is good for the other
    found = claims.difference(shared + rng.normal(1, 1, 3), shared + rng.normal(0, 1, 3))
    inside += found.low <= 1 <= found.high
  assert 0.92 < inside / 400 < 0.98


def test_one_seed_resolves_nothing():
  assert claims.verdict(claims.difference([9.0], [1.0]), low=0) == claims.UNRESOLVED


def test_equal_numbers_have_an_interval_of_no_width():
  assert claims.difference([3.0, 3.0], [1.0, 1.0]) == claims.Estimate(2.0, 2.0, 2.0)


@pytest.mark.parametrize('numbers', ([1.0, math.nan], [1.0, math.inf], [math.inf, -math.inf]))
def test_what_is_not_finite_is_not_resolved(numbers):
  found = claims.difference(numbers, [0.0, 0.0])
  assert math.isnan(found.value) and claims.verdict(found, low=0) == claims.UNRESOLVED


@pytest.mark.parametrize('second', ([0.1, -0.1], [-0.1, -0.1], [0.1, 0.0], [0.1, math.nan]))
def test_a_ratio_by_a_gain_is_not_resolved(second):
  assert math.isnan(claims.ratio([0.1, 0.2], second).value)


def test_a_ratio_of_two_falls_is_that_of_their_sizes():
  assert claims.ratio([-0.4, -0.3], [-0.2, -0.1]) == claims.ratio([0.4, 0.3], [0.2, 0.1])


@pytest.mark.parametrize('low, high, want', [
    (8, None, 'holds'), (10, None, claims.UNRESOLVED), (13, None, 'fails'), (None, 8, 'fails'), (None, 12, 'holds'),
    (8, 12, 'holds'), (0, 5, 'fails'), (10, 20, claims.UNRESOLVED), (9, 11, 'holds'), (None, None, 'holds')])
def test_verdicts(low, high, want):
  assert claims.verdict(claims.Estimate(10.0, 9.0, 11.0), low, high) == want


def test_results_of_other_seeds_are_no_pairs():
  with pytest.raises(ValueError, match='seeds that one of them lacks'):
    claims.difference([1.0, 2.0], [1.0])
  with pytest.raises(ValueError, match='at least one'):
    claims.mean([])
