"""Observers against numpy on all batches at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, histograms, observers, qarray, ranges, specs
from qat.core.qarray import Spec

TENSOR, CHANNEL = (...,), (..., 1)
RNG = np.random.default_rng(0)
# Growing, so that histograms must rescale.
BATCHES = [(s * RNG.standard_normal((8, 16, 32)) + 0.1).astype(np.float32) for s in (0.5, 1.0, 1.2, 4.0, 2.0)]
ALL = np.stack(BATCHES)
INT8, UINT8 = specs.integer(8, TENSOR), specs.affine(8, TENSOR)


def observe(observer, block, batches=BATCHES):
  state = observer.init((1, 1, batches[0].shape[-1]), block)
  update = jax.jit(observer.update, static_argnums=2)
  for x in batches:
    state = update(state, x, block)
  return state


def test_min_max_per_tensor_and_channel():
  state = observe(observers.MinMax(), TENSOR)
  assert state.low.shape == (1, 1, 1) and (state.low, state.high) == (ALL.min(), ALL.max())
  assert observers.lowest(state) == ALL.min() and state.batches == len(BATCHES)
  state = observe(observers.MinMax(), CHANNEL)
  np.testing.assert_array_equal(state.low[0, 0], ALL.min((0, 1, 2)))
  scale, zero = observers.MinMax().fit(state, specs.integer(8, CHANNEL))
  np.testing.assert_allclose(scale[0, 0], np.abs(ALL).max((0, 1, 2)) / 127, rtol=1e-6)
  assert zero is None


def test_batches_may_have_any_length():
  state = observe(observers.MinMax(), TENSOR, BATCHES[:1])
  state = observers.MinMax().update(state, BATCHES[1][:3, :5], TENSOR)
  assert state.high == max(BATCHES[0].max(), BATCHES[1][:3, :5].max())


def test_moving_average_is_torchs():
  """min_val + averaging_constant * (min_cur - min_val), from the first batch's."""
  low, high = BATCHES[0].min(), BATCHES[0].max()
  for x in BATCHES[1:]:
    low, high = low + 0.01 * (x.min() - low), high + 0.01 * (x.max() - high)
  state = observe(observers.MovingAverage(), TENSOR)
  np.testing.assert_allclose([state.low.item(), state.high.item()], [low, high], rtol=1e-6)


def test_mean_abs_gives_lsqs_first_step():
  state = observe(observers.MeanAbs(), CHANNEL)
  spec = Spec(formats.INT4, CHANNEL)
  np.testing.assert_allclose(observers.MeanAbs().fit(state, spec)[0][0, 0],
                             2 * np.abs(ALL).mean((0, 1, 2)) / np.sqrt(7), rtol=1e-5)
  one = observe(observers.MeanAbs(), TENSOR, BATCHES[:1])
  np.testing.assert_allclose(observers.MeanAbs().fit(one, INT8)[0], ranges.lsq_init(BATCHES[0], INT8)[0], rtol=1e-6)


def test_a_histogram_that_grew_is_the_histogram_of_all():
  """Dyadic numbers and a first top of 1: every bin edge is exact."""
  batches = [np.float32(RNG.integers(-2**20, 2**20, 4096) * 2.0**-20 * s) for s in (1, 0.5, 2, 8, 4)]
  batches[0][0] = -1
  state = observe(observers.Percentile(bins=64), TENSOR, [b.reshape(4, 32, 32) for b in batches])
  x = np.concatenate(batches)
  x[0] = np.nextafter(np.float32(-1), np.float32(0))                   # The top is in the last bin.
  assert state.top == 8
  want = [np.histogram(np.abs(a), bins=64, range=(0, 8))[0] for a in (x[x < 0], x[x >= 0])]
  np.testing.assert_array_equal(state.counts, want)


def test_zeros_before_the_first_number_lose_nothing():
  zero = np.zeros((2, 4, 32), np.float32)
  state = observe(observers.Percentile(bins=64), TENSOR, [zero, zero + 3, zero])
  assert state.top == 3 and state.counts.sum() == 3 * zero.size and state.counts[1, 0] == 2 * zero.size


@pytest.mark.parametrize('percent', [50.0, 90.0, 99.0, 99.9])
def test_percentile_is_numpys_within_a_bin(percent):
  observer = observers.Percentile(percent=percent)
  state = observe(observer, TENSOR)
  width = float(state.top) / 2048

  def check(got, x, q):
    # Neighbours in the tail are further apart than bins.
    below, above = (np.quantile(x, q, method=m) for m in ('lower', 'higher'))
    assert below - 2 * width < got < above + 2 * width

  check(observer.range(state, INT8)[1].item(), np.abs(ALL), percent / 100)
  low, high = (a.item() for a in observer.range(state, UINT8))
  cut = (1 - percent / 100) / 2
  check(low, ALL, cut)
  check(high, ALL, 1 - cut)


@pytest.mark.parametrize('spec', [specs.integer(4, TENSOR), specs.affine(4, TENSOR), Spec(formats.UINT4, TENSOR)],
                         ids=str)
def test_search_is_as_good_as_the_search_on_the_numbers(spec):
  batches = BATCHES if spec.format.min < 0 or spec.zero else [np.maximum(b, 0) for b in BATCHES]
  x = np.stack(batches).reshape(-1, 16, 32)
  scale, zero = observers.Search().fit(observe(observers.Search(), TENSOR, batches), spec)
  best = ranges.Search(steps=96, lowest=0.05)(x, spec)
  loss = lambda s, z: float(jnp.mean((x - qarray.fake(x, spec, s, z)) ** 2))
  assert loss(scale, zero) < 1.01 * loss(*best) < 0.9 * loss(*ranges.absmax(x, spec))


def test_entropy_of_one_batch_is_the_rules():
  x = RNG.standard_t(2, (8, 64, 32)).astype(np.float32)
  state = observe(observers.Entropy(), TENSOR, [x])
  got, want = observers.Entropy().fit(state, INT8)[0], ranges.Entropy()(x, INT8)[0]
  np.testing.assert_allclose(got.item(), want.item(), rtol=1e-6)


def test_an_unsigned_format_needs_nothing_below_zero():
  state = observe(observers.MinMax(), TENSOR, [np.maximum(b, 0) for b in BATCHES])
  assert observers.lowest(state) == 0
  scale, _ = observers.MinMax().fit(state, Spec(formats.UINT8, TENSOR))
  np.testing.assert_allclose(scale.item(), ALL.max() / 255, rtol=1e-6)


def test_quantile_and_counts_by_hand():
  counts = histograms.count(jnp.array([-0.5, 0.0, 0.3, 0.9, 1.0]), jnp.float32(1), 2)
  np.testing.assert_array_equal(counts, [[0, 1], [2, 2]])
  assert histograms.quantile(jnp.array([2.0, 2.0]), 0.75) == 1.5
  assert histograms.quantile(jnp.array([4.0, 0.0, 0.0]), 1.0) == 1


def test_histograms_want_one_block():
  with pytest.raises(ValueError, match=r'has 32 of them, and the observer keeps one histogram. Use the block'):
    observers.Entropy().init((1, 1, 32), CHANNEL)
  with pytest.raises(ValueError, match='a mean of .x. says nothing of a zero'):
    observers.MeanAbs().fit(observe(observers.MeanAbs(), TENSOR), UINT8)
