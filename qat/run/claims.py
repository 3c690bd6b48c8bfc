"""Claims of a paper as quantities with confidence intervals over seeds, and what the interval says of them.

Runs of one seed share their float network and their batches, so quantities are taken pair by pair: seeds that are good
or bad for both drop out. The intervals are Student's, since pages have 3 to 5 seeds: a bootstrap of so few numbers
stays within their least and largest, which is far too narrow.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
HOLDS, FAILS, UNRESOLVED = 'holds', 'fails', 'not resolvable at this size'


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A quantity over seeds, and its interval: (-inf, inf) for one seed, NaN where the quantity has no value."""
  value: float
  low: float
  high: float


def mean(numbers):
  """The mean of float[n], with Student's interval.

  >>> mean([1.0, 2.0, 3.0])                                 # 2 -+ 4.303 sqrt(1 / 3)
  Estimate(value=2.0, low=-0.48413771, high=4.48413771)
  """
  numbers = np.asarray(numbers, np.float64)
  if numbers.ndim != 1 or not numbers.size:
    raise ValueError(f'mean of an array of shape {numbers.shape}: it takes [n], a number a seed. Give at least one.')
  if not np.isfinite(numbers).all():
    return Estimate(*[math.nan] * 3)
  value, n = float(numbers.mean()), numbers.size
  if n == 1:
    return Estimate(value, -math.inf, math.inf)
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
  return Estimate(*(round(x, 8) for x in (value, value - half, value + half)))


def difference(first, second):
  """first - second, seed by seed.

  Args:
    first, second: float[n], of the same seeds in the same order.
  """
  return mean(np.subtract(*_pair(first, second)))


def ratio(first, second):
  """first / second: the geometric mean over seeds. NaN unless all have one sign; changes of accuracy are negative.

  >>> ratio([2.0, 8.0], [1.0, 2.0]).value                   # sqrt(2 4)
  2.82842712
  """
  first, second = _pair(first, second)
  signs = {*np.sign(first), *np.sign(second)}
  if signs not in ({1.0}, {-1.0}):
    return Estimate(*[math.nan] * 3)
  logs = mean(np.log(np.abs(first)) - np.log(np.abs(second)))
  return Estimate(*(round(math.exp(x), 8) for x in (logs.value, logs.low, logs.high)))


def verdict(estimate, low=None, high=None):
  """Whether a quantity lies within [low, high], as far as its interval tells; None is no bound.

  >>> verdict(Estimate(11.3, 9.1, 13.5), low=8), verdict(Estimate(11.3, 4.1, 18.5), low=8)
  ('holds', 'not resolvable at this size')
  """
  low, high = -math.inf if low is None else low, math.inf if high is None else high
  if math.isnan(estimate.value):
    return UNRESOLVED
  if low <= estimate.low and estimate.high <= high:
    return HOLDS
  return FAILS if estimate.high < low or estimate.low > high else UNRESOLVED


def _pair(first, second):
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if first.shape != second.shape or first.ndim != 1:
    raise ValueError(f'A claim about results of shapes {first.shape} and {second.shape}: both are [n], of the same '
                     'seeds in the same order. Run the seeds that one of them lacks.')
  return first, second
