"""Top-k accuracy against scikit-learn, and what happens at ties."""

import numpy as np
import pytest
from sklearn import metrics

from qat.evals import accuracy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 10)).astype(np.float32)
LABELS = RNG.integers(0, 10, 200)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_top_k_is_that_of_scikit_learn(k):
  got = accuracy.top_k(LOGITS, LABELS, k)
  p = metrics.top_k_accuracy_score(LABELS, LOGITS, k=k, labels=np.arange(10))
  np.testing.assert_allclose([got.value, got.error], [p, np.sqrt(p * (1 - p) / 199)], rtol=1e-9)


def test_ranks_are_places_in_a_stable_sort():
  scores = RNG.integers(0, 3, (200, 10)).astype(np.float32)  # Full of ties.
  order = np.argsort(-scores, axis=1, kind='stable')
  np.testing.assert_array_equal(accuracy.ranks(scores, LABELS), (order == LABELS[:, None]).argmax(axis=1))


def test_a_model_that_cannot_tell_is_right_by_chance():
  assert accuracy.top_k(np.zeros((200, 10)), LABELS).value == (LABELS == 0).mean()


def test_wrong_input():
  with pytest.raises(ValueError, match='row 3 have a NaN'):
    accuracy.top_k(np.where(np.arange(200)[:, None] == 3, np.nan, LOGITS), LABELS)
  with pytest.raises(ValueError, match='from 0 to 10: they are whole numbers from 0 to 9'):
    accuracy.top_k(LOGITS, np.arange(200) % 11)
  with pytest.raises(ValueError, match=r'labels \(200,\) in scores \(10,\)'):
    accuracy.top_k(LOGITS[0], LABELS)
  with pytest.raises(ValueError, match='at least one row'):
    accuracy.top_k(LOGITS[:0], LABELS[:0])
