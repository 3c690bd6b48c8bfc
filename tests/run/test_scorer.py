"""The divergence of two models over a test set, against scipy's."""

from flax import nnx
import numpy as np
import pytest
from scipy import special

from qat.run import objectives
from qat.run import scorer
from qat.run import sources


class Table(nnx.Module):
  """Scores by a table, the same for each example that has the same label: f32[b, *shape] of a table f32[n, *shape]."""

  def __init__(self, table):
    self.table = nnx.Param(np.asarray(table, np.float32))

  def __call__(self, x):
    return self.table[...][x]


@pytest.mark.parametrize('shape', ((5,), (3, 5)))
def test_mean_kl_is_that_of_scipy_with_a_last_batch_that_is_not_full(shape):
  rng = np.random.default_rng(0)
  first, second = rng.normal(0, 2, (2, 7, *shape))
  test = sources.Arrays(dict(image=np.arange(7, dtype=np.int32)), dict)
  score = scorer.Scorer(objectives.classification, test, 4)
  p, q = special.softmax(first, -1), special.softmax(second, -1)
  assert score.mean_kl(Table(first), Table(second)) == pytest.approx(special.rel_entr(p, q).sum(-1).mean(), rel=1e-5)
  assert score.mean_kl(Table(first), Table(first)) == 0.0


def test_mean_kl_of_scores_that_rule_a_class_out():
  first, second = [[0.0, 0.0, -np.inf]], [[0.0, 0.0, 0.0]]
  score = scorer.Scorer(objectives.classification, sources.Arrays(dict(image=np.zeros(1, np.int32)), dict), 1)
  assert score.mean_kl(Table(first), Table(second)) == pytest.approx(np.log(3 / 2), rel=1e-6)
  assert score.mean_kl(Table(second), Table(first)) == np.inf
