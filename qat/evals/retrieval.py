"""How well embeddings find the text that belongs to a query: recall@k and mean reciprocal rank.

MRR: Voorhees. The TREC-8 Question Answering Track Report, 1999, Sec. 3.
"""

import numpy as np

from qat.evals import accuracy, agreement


def similarity(queries, documents):
  """The cosine of each pair: float[n, d], float[m, d] -> f32[n, m]."""
  queries, documents = (np.asarray(a, np.float32) for a in (queries, documents))
  if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
    raise ValueError(f'similarity of embeddings {queries.shape} and {documents.shape}: they are [n, d] and [m, d]. '
                     'Give both from one model.')
  unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), np.finfo(np.float32).tiny)
  return unit(queries) @ unit(documents).T


def ranks(queries, documents, answers=None):
  """How many documents come before the answer of each query, by falling cosine.

  Args:
    queries: float[n, d].
    documents: float[m, d].
    answers: i32[n], the document that belongs to each query; the one of its number if not given.

  Returns:
    i64[n], from 0; of equal documents the first leads.
  """
  answers = np.arange(len(queries)) if answers is None else answers
  return accuracy.ranks(similarity(queries, documents), answers)


def recall(found, k):
  """Recall@k of `ranks`, i64[n]: the share of answers among the first k, as an Estimate."""
  return agreement.share(np.asarray(found) < k)


def mrr(found):
  """The mean of 1 / (1 + rank) over `ranks`, i64[n], as an Estimate.

  >>> mrr([0, 1, 3]).value   # (1 + 1/2 + 1/4) / 3
  0.5833333333333334
  """
  return agreement.mean(1 / (1 + np.asarray(found, np.float64)))
