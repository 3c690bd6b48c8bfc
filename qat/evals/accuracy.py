"""Top-k accuracy of a classifier."""

import numpy as np

from qat.evals import agreement


def ranks(scores, labels):
  """How many classes come before the label, by falling score; of equal scores the first class leads.

  Args:
    scores: float[n, c].
    labels: i32[n], each less than c.

  Returns:
    i64[n], from 0.

  >>> ranks([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]], [2, 1])
  array([1, 1])
  """
  scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
  if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.size:
    raise ValueError(f'ranks of labels {labels.shape} in scores {scores.shape}: they are [n] and [n, classes], of at '
                     'least one row. Flatten leading axes.')
  if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
    raise ValueError(f'Labels are {labels.dtype} from {labels.min()} to {labels.max()}: they are whole numbers from 0 '
                     f'to {scores.shape[1] - 1}, the index of a class. Map them to indices.')
  if np.isnan(scores).any():
    raise ValueError(f'The scores of row {int(np.isnan(scores).any(axis=1).argmax())} have a NaN, which has no rank. '
                     'Check the model on this input.')
  own = np.take_along_axis(scores, labels[:, None], axis=1)                 # [n, 1]
  before = np.arange(scores.shape[1]) < labels[:, None]
  return ((scores > own) | ((scores == own) & before)).sum(axis=1)


def correct(logits, labels, k=1):
  """Whether the label is among the k highest: bool[n], for tests of pairs (evals/paired.py)."""
  return ranks(logits, labels) < k


def top_k(logits, labels, k=1):
  """The share of labels among the k highest of float[n, c], as an Estimate with a binomial error."""
  return agreement.share(correct(logits, labels, k))
