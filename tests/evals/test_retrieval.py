"""Retrieval against a sort in float64."""

import numpy as np
import pytest

from qat.evals import retrieval

RNG = np.random.default_rng(0)
DOCUMENTS = RNG.normal(size=(40, 8))
QUERIES = DOCUMENTS[:30] * RNG.uniform(0.1, 9, (30, 1)) + RNG.normal(size=(30, 8)) * 0.8


def sorted_ranks(answers):
  cosine = QUERIES @ DOCUMENTS.T / np.linalg.norm(QUERIES, axis=1)[:, None] / np.linalg.norm(DOCUMENTS, axis=1)
  return [list(np.argsort(-row)).index(a) for row, a in zip(cosine, answers)]


def test_ranks_recall_and_mrr():
  found = retrieval.ranks(QUERIES, DOCUMENTS)
  want = np.array(sorted_ranks(range(30)))
  np.testing.assert_array_equal(found, want)
  assert 0 < retrieval.recall(found, 1).value < retrieval.recall(found, 5).value
  assert retrieval.recall(found, 5).value == (want < 5).mean()
  np.testing.assert_allclose(retrieval.mrr(found).value, np.mean(1 / (1 + want)))


def test_answers_in_another_order():
  answers = RNG.permutation(40)[:30]
  np.testing.assert_array_equal(retrieval.ranks(QUERIES, DOCUMENTS, answers), sorted_ranks(answers))


def test_embeddings_that_collapsed_find_nothing():
  found = retrieval.ranks(np.ones((10, 4)), np.ones((10, 4)))
  assert retrieval.recall(found, 1).value == 0.1
  assert retrieval.recall(retrieval.ranks(np.zeros((10, 4)), DOCUMENTS[:10, :4]), 1).value == 0.1


def test_wrong_input():
  with pytest.raises(ValueError, match='Give both from one model'):
    retrieval.similarity(QUERIES, DOCUMENTS[:, :4])
  with pytest.raises(ValueError, match='have a NaN'):
    retrieval.ranks(QUERIES * np.nan, DOCUMENTS)
  with pytest.raises(ValueError, match='from 0 to 39: they are whole numbers from 0 to 29'):
    retrieval.ranks(DOCUMENTS, QUERIES)
