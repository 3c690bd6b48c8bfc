"""Observers: batches in, a range out. How static activation quantizers are calibrated.

An observer is a frozen dataclass of pure functions, and its state a pytree of arrays, so that the
whole of it runs under jit:

    init(shape, block)          the state before any batch; `shape` as the batches', of any length
    update(state, x, block)     the state after one more
    range(state, spec)          (low, high), each [*shape / block]
    fit(state, spec)            (scale, zero) for `qarray.encode`
    lowest(state)               the least number seen: 0 or more allows an unsigned format

`block` shares the leading axes: (...,) is one range, (..., 1) one for each trailing channel.
Observers with a histogram keep one, and so want (...,). A state that has seen nothing has
low = inf and high = -inf.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qat.core import blocks, histograms, qarray, ranges


class Seen(NamedTuple):
  """The least and the largest number, f32[*shape / block], and the number of batches, f32[]."""
  low: jax.Array
  high: jax.Array
  batches: jax.Array


class Histogram(NamedTuple):
  """`Seen`, with a histogram: f32[2, bins] over [0, top): see core/histograms.py."""
  low: jax.Array
  high: jax.Array
  counts: jax.Array
  top: jax.Array


class Mean(NamedTuple):
  """`Seen`, with the mean of |x|: f32[*shape / block]."""
  low: jax.Array
  high: jax.Array
  batches: jax.Array
  mean: jax.Array


def lowest(state):
  """The least number seen: f32[]."""
  return jnp.min(state.low)


def _empty(shape, block):
  size = blocks.scale_shape(block, shape)
  return jnp.full(size, jnp.inf), jnp.full(size, -jnp.inf)


def _ends(x, block):
  x = x.astype(jnp.float32)
  return blocks.over_blocks(jnp.min, x, block), blocks.over_blocks(jnp.max, x, block)


@dataclasses.dataclass(frozen=True)
class MinMax:
  """The least and the largest number of all batches. torch.ao's MinMaxObserver."""

  def init(self, shape, block):
    return Seen(*_empty(shape, block), jnp.zeros(()))

  def update(self, state, x, block):
    low, high = _ends(x, block)
    return Seen(jnp.minimum(state.low, low), jnp.maximum(state.high, high), state.batches + 1)

  def range(self, state, spec):
    return state.low, state.high

  def fit(self, state, spec):
    return qarray.from_range(*self.range(state, spec), spec)


@dataclasses.dataclass(frozen=True)
class MovingAverage(MinMax):
  """low <- low + rate (min(x) - low), and high likewise, from the first batch's ends on.

  torch.ao's MovingAverageMinMaxObserver, with its averaging_constant of 0.01.
  """
  rate: float = 0.01

  def update(self, state, x, block):
    towards = lambda old, new: old + qarray.exact(self.rate * (new - old))
    ends = _ends(x, block)
    first = state.batches == 0
    low, high = (jnp.where(first, new, towards(jnp.where(first, new, old), new))
                 for old, new in zip((state.low, state.high), ends))
    return Seen(low, high, state.batches + 1)


@dataclasses.dataclass(frozen=True)
class MeanAbs(MinMax):
  """The mean of |x|, for LSQ's first step: 2 mean|v| / sqrt(Q_P)."""

  def init(self, shape, block):
    seen = MinMax.init(self, shape, block)
    return Mean(*seen, jnp.zeros_like(seen.low))

  def update(self, state, x, block):
    seen = MinMax.update(self, state, x, block)
    mean = blocks.over_blocks(blocks.mean, jnp.abs(x.astype(jnp.float32)), block)
    change = qarray.exact((mean - state.mean) * qarray.reciprocal(seen.batches))
    return Mean(*seen, state.mean + change)

  def fit(self, state, spec):
    if spec.zero is not None:
      raise ValueError(f'MeanAbs on {spec}: a mean of |x| says nothing of a zero. '
                       'Use MinMax, or a grid without a zero.')
    return qarray.place(state.mean, spec, ranges.lsq_step(state.mean, spec.format))


@dataclasses.dataclass(frozen=True)
class _Histogram(MinMax):
  """Abstract. Counts |x| in `bins`; `range` is its children's."""
  bins: int = 2048

  def init(self, shape, block):
    low, high = _empty(shape, block)
    if low.size != 1:
      raise ValueError(f'{self} on blocks {block}: shape {tuple(shape)} has {low.size} of them, and the '
                       'observer keeps one histogram. Use the block (...,), or MinMax.')
    return Histogram(low, high, jnp.zeros((2, self.bins)), jnp.zeros(()))

  def update(self, state, x, block):
    x = x.astype(jnp.float32)
    low, high = _ends(x, block)
    amax = jnp.maximum(-low, high).reshape(())
    counts, top = histograms.grow(state.counts, state.top, amax)
    counts += histograms.count(x, top, self.bins)
    return Histogram(jnp.minimum(state.low, low), jnp.maximum(state.high, high), counts, top)

  def _clip(self, state, low, high):
    """[low, high], in bins of |x|, no wider than what was seen: f32[*shape / block] each."""
    width = qarray.divide(state.top, self.bins)
    return jnp.maximum(state.low, low * width), jnp.minimum(state.high, high * width)


@dataclasses.dataclass(frozen=True)
class Percentile(_Histogram):
  """Keeps `percent` % of all numbers in range: of |x|, or a half of the rest is cut at each end."""
  percent: float = 99.99

  def __post_init__(self):
    ranges.check_percent(self)

  def range(self, state, spec):
    share = self.percent / 100
    if ranges.is_symmetric(spec):
      limit = histograms.quantile(state.counts.sum(0), share)
      return self._clip(state, -limit, limit)
    line = jnp.concatenate([state.counts[0, ::-1], state.counts[1]])     # f32[2 bins], left to right
    low, high = (histograms.quantile(line, s) - self.bins for s in ((1 - share) / 2, (1 + share) / 2))
    return self._clip(state, low, high)


@dataclasses.dataclass(frozen=True)
class Search(_Histogram):
  """The range with the least sum |x - x_hat|^p over the bins' centres: see ranges.Search."""
  p: float = 2.0
  lowest: float = 0.05
  steps: int = 96

  def range(self, state, spec):
    width = qarray.divide(state.top, self.bins)
    centre = (jnp.arange(self.bins, dtype=jnp.float32) + 0.5) * width
    x = jnp.stack([-centre, centre])                                     # f32[2, bins], as the counts
    whole = dataclasses.replace(spec, block=(...,))
    low, high = self._ends(state, spec)
    rule = ranges.Search(self.p, self.lowest, self.steps)

    def error(r):
      scale, zero = qarray.from_range(*ranges.shrink(low, high, r, spec), whole)
      x_hat = qarray.exact(qarray.fake(x, whole, scale, zero))
      return blocks.mean(qarray.exact(rule.distance(x - x_hat) * state.counts), (0, 1)).reshape(1, 1)

    r = rule.best(error, (1, 1))
    return tuple(a.reshape(state.low.shape) for a in ranges.shrink(low, high, r, spec))

  def _ends(self, state, spec):
    low, high = state.low.reshape(1, 1), state.high.reshape(1, 1)
    if ranges.is_symmetric(spec):
      high = jnp.maximum(-low, high)
      low = -high
    return low, high


@dataclasses.dataclass(frozen=True)
class Entropy(_Histogram):
  """The threshold on |x| of the least KL divergence: see histograms.least_divergence."""
  levels: int = 128

  def range(self, state, spec):
    limit = histograms.least_divergence(state.counts.sum(0), self.levels)
    return self._clip(state, -limit, limit)
