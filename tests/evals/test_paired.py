"""Paired tests: by hand, and by how often they are wrong."""

import math

import numpy as np
import pytest

from qat.evals import paired


def test_mcnemar_by_hand():
  """12 against 3 of 15: p = 2 sum_{k <= 3} C(15, k) / 2^15."""
  first = np.array([True] * 50 + [True] * 12 + [False] * 3 + [False] * 7)
  second = np.array([True] * 50 + [False] * 12 + [True] * 3 + [False] * 7)
  got = paired.mcnemar(first, second)
  want = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15
  assert (got.only_first, got.only_second) == (12, 3)
  np.testing.assert_allclose(got.p_value, want, rtol=1e-9)
  assert paired.mcnemar(second, first).p_value == got.p_value
  assert paired.mcnemar(first, first).p_value == 1


def test_the_interval_covers_the_truth():
  """Differences of mean 0.3: a 90 % interval misses it in about 10 % of 100 draws."""
  rng = np.random.default_rng(0)
  missed = 0
  for seed in range(100):
    first = rng.normal(size=60) * 5
    got = paired.bootstrap(first, first + 0.3 + rng.normal(size=60), confidence=0.9, seed=seed)
    missed += not got.low <= 0.3 <= got.high
  assert 3 <= missed <= 20


def test_pairing_removes_what_both_share():
  rng = np.random.default_rng(1)
  first = rng.normal(size=500) * 5
  second = first + rng.normal(size=500) * 0.1
  got = paired.bootstrap(first, second)
  d = second - first
  np.testing.assert_allclose([got.difference, got.error], [d.mean(), d.std() / np.sqrt(500)], rtol=0.05)
  # A normal's interval, 1.96 errors on each side.
  np.testing.assert_allclose([got.low, got.high], d.mean() + 1.96 * np.array([-1, 1]) * got.error, atol=0.1 * got.error)
  assert paired.bootstrap(first, second) == got != paired.bootstrap(first, second, seed=1)


def test_differences_that_are_all_equal():
  assert paired.bootstrap([1.0, 2.0], [1.5, 2.5]) == paired.Interval(0.5, 0.5, 0.5, 0.0)
  assert paired.bootstrap([1.0], [3.0]).difference == 2.0


def test_wrong_input():
  with pytest.raises(ValueError, match='of the same inputs in the same order'):
    paired.mcnemar([True], [True, False])
  with pytest.raises(ValueError, match='at least one pair'):
    paired.bootstrap([], [])
  with pytest.raises(TypeError, match='takes bool'):
    paired.mcnemar([1, 0], [1, 1])
  with pytest.raises(ValueError, match='pair 1 differs by a number that is not finite'):
    paired.bootstrap([1.0, np.nan], [1.0, 2.0])
