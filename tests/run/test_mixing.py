"""Mixtures of pairs keep what the papers' equations say."""

import numpy as np
import pytest

from qat.run import mixing


@pytest.fixture
def pair():
  random = np.random.default_rng(0)
  return random.normal(size=(2, 12, 10, 3)).astype(np.float32), np.eye(4, dtype=np.float32)[[1, 3]]


def test_mixup_is_the_convex_combination_both_ways(pair):
  x, y = pair
  mixed, targets = mixing.mixup(x, y, 0.7)
  np.testing.assert_allclose(mixed[0], 0.7 * x[0] + 0.3 * x[1], atol=1e-6)
  np.testing.assert_allclose(mixed[1], 0.7 * x[1] + 0.3 * x[0], atol=1e-6)
  np.testing.assert_allclose(targets, [[0, 0.7, 0, 0.3], [0, 0.3, 0, 0.7]], atol=1e-6)
  np.testing.assert_allclose(mixed.sum(0), x.sum(0), atol=1e-5)


@pytest.mark.parametrize('share', [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize('centre', [(0.5, 0.5), (0.0, 0.99), (0.9, 0.1)])
def test_cutmix_weighs_labels_by_the_areas(pair, share, centre):
  x, y = pair
  mixed, targets = mixing.cutmix(x, y, share, centre)
  other = (mixed[0] == x[1]).all(-1)  # [h, w]
  assert ((mixed[0] == x[0]).all(-1) | other).all()
  np.testing.assert_allclose(targets[0], [0, 1 - other.mean(), 0, other.mean()], atol=1e-6)
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
  if centre == (0.5, 0.5):
    assert abs((1 - other.mean()) - share) < 0.15
  rows, columns = np.where(other)
  if len(rows):  # The part is a rectangle.
    assert other[rows.min():rows.max() + 1, columns.min():columns.max() + 1].all()


def test_cutmix_changes_no_array_that_it_was_given(pair):
  x, y = pair
  before = x.copy()
  mixing.cutmix(x, y, 0.3, (0.5, 0.5))
  np.testing.assert_array_equal(x, before)


def test_smoothed_labels():
  np.testing.assert_allclose(mixing.smoothed(np.array([2, 0]), 4, 0.1), [
      [0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], atol=1e-6)
  np.testing.assert_array_equal(mixing.smoothed(np.array([1]), 3, 0.0), [[0, 1, 0]])


def test_shares_are_of_the_beta_distribution(pair):
  x, y = pair
  random = np.random.default_rng(0)
  shares = np.array([mixing.Mixing(mixup=0.2)(x, y, random)[1][0, 1] for _ in range(2000)])
  assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.02


def test_of_both_each_is_drawn_half_of_the_time(pair):
  x, y = pair
  random = np.random.default_rng(0)
  cut = [(lambda m: ((m == x[0]) | (m == x[1])).all())(mixing.Mixing(1.0, 1.0)(x, y, random)[0][0]) for _ in range(300)]
  assert 110 < sum(cut) < 190


def test_a_negative_alpha():
  with pytest.raises(ValueError, match='0 leaves it out'):
    mixing.Mixing(mixup=-1.0)
