"""Whether one model beats another on the same inputs: tests of pairs, which see far smaller differences.

McNemar. Note on the sampling error of the difference between correlated proportions, Psychometrika 12, 1947; exact,
as a binomial test of the pairs on which the models differ.
Efron and Tibshirani. An Introduction to the Bootstrap, 1993, Ch. 13: the percentile interval.
"""

import dataclasses

import numpy as np
from scipy import stats

RESAMPLES = 9999       # scipy's own default: the ends of a 95 % interval are known to about 1 % of its length.
BATCH_NUMBERS = 2**22  # Resampled numbers in memory at a time: 32 MiB.


@dataclasses.dataclass(frozen=True)
class McNemar:
  """The pairs on which two models differ, and the chance of so uneven a split if neither is better."""
  only_first: int
  only_second: int
  p_value: float


def mcnemar(first, second):
  """McNemar's exact two-sided test.

  Args:
    first, second: bool[n], whether each model was right about each input (evals/accuracy.py `correct`).

  >>> mcnemar([True] * 8 + [False], [False] * 8 + [True]).p_value   # 2 (1 + 9) / 2^9
  0.0390625
  """
  first, second = _pair(first, second, bool)
  only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
  differ = only_first + only_second
  p = float(stats.binomtest(only_first, differ, 0.5).pvalue) if differ else 1.0
  return McNemar(only_first, only_second, p)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean difference, its bootstrap confidence interval and its standard error."""
  difference: float
  low: float
  high: float
  error: float


def bootstrap(first, second, confidence=0.95, seed=0):
  """The mean of second - first, with its interval over resampled pairs.

  Args:
    first, second: float[n], what each model scored on each input: losses, or right and wrong.
    confidence: of the interval.
    seed: of the resampling.
  """
  first, second = _pair(first, second, np.float64)
  with np.errstate(invalid='ignore'):
    difference = second - first
  if not np.isfinite(difference).all():
    raise ValueError(f'bootstrap: pair {int((~np.isfinite(difference)).argmax())} differs by a number that is not '
                     'finite. Check both models on this input.')
  if (difference == difference[0]).all():  # Every resample has the same mean.
    return Interval(*(float(difference[0]),) * 3, 0.0)
  found = stats.bootstrap((difference,), np.mean, confidence_level=confidence, n_resamples=RESAMPLES,
                          method='percentile', batch=max(1, BATCH_NUMBERS // len(difference)),
                          rng=np.random.default_rng(seed))
  return Interval(float(difference.mean()), *map(float, found.confidence_interval), float(found.standard_error))


def _pair(first, second, dtype):
  first, second = np.asarray(first), np.asarray(second)
  if first.shape != second.shape or first.ndim != 1 or not first.size:
    raise ValueError(f'A test of pairs of shapes {first.shape} and {second.shape}: both are [n], of the same inputs in '
                     'the same order. Give at least one pair.')
  if dtype is bool and not first.dtype == second.dtype == np.bool_:
    raise TypeError(f'mcnemar of {first.dtype} and {second.dtype}: it takes bool, whether each model was right. '
                    'Compare predictions with labels first.')
  return first.astype(dtype), second.astype(dtype)
