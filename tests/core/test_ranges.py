"""Range rules against brute force in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qat.core import formats, histograms, qarray, ranges, specs
from qat.core.qarray import Spec

X = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
BLOCKS = X.reshape(16, 8, 32)
INT4 = specs.integer(4, (32,))


def fit(rule, x, spec):
  return jax.jit(rule, static_argnums=1)(x, spec)


def error(x, spec, scale, zero=None):
  return float(jnp.sum((x - qarray.fake(x, spec, scale, zero)) ** 2))


def test_closed_forms():
  amax = np.abs(BLOCKS).max(-1)
  np.testing.assert_allclose(fit(ranges.absmax, X, INT4)[0], amax / 7, rtol=1e-6)
  np.testing.assert_allclose(fit(ranges.midrange, X, INT4)[0], amax / 7.5, rtol=1e-6)
  np.testing.assert_allclose(fit(ranges.lsq_init, X, INT4)[0], 2 * np.abs(BLOCKS).mean(-1) / np.sqrt(7), rtol=1e-6)
  np.testing.assert_allclose(fit(ranges.absmean, X, INT4)[0], np.abs(BLOCKS).mean(-1), rtol=1e-6)
  at = np.abs(BLOCKS).argmax(-1)[..., None]
  np.testing.assert_array_equal(fit(ranges.signed_extreme, X, INT4)[0], np.take_along_axis(BLOCKS, at, -1)[..., 0] / -8)


def test_affine_ranges_are_max_minus_min():
  spec = specs.affine(4, (32,))
  scale, zero = fit(ranges.absmax, X, spec)
  low, high = BLOCKS.min(-1), BLOCKS.max(-1)
  np.testing.assert_allclose(scale, (high - low) / 15, rtol=1e-6)
  np.testing.assert_array_equal(qarray.decode(zero), np.rint(-low / ((high - low) / np.float32(15))))


def test_signed_extreme_takes_the_first_of_equals():
  assert ranges.signed_extreme(jnp.array([[1.0, 3.0, -3.0, 2.0]]), Spec(formats.INT4, (None,)))[0] == -3 / 8
  assert ranges.signed_extreme(jnp.array([[1.0, -3.0, 3.0, 2.0]]), Spec(formats.INT4, (None,)))[0] == 3 / 8


def test_weights_on_the_lattice_stay_on_it():
  """What was trained on Q4_0's grid is found again; midrange's lattice is another one."""
  w = qarray.fake(X, specs.Q4_0, *fit(ranges.signed_extreme, X, specs.Q4_0))
  np.testing.assert_array_equal(qarray.fake(w, specs.Q4_0, *fit(ranges.signed_extreme, w, specs.Q4_0)), w)
  assert (qarray.fake(w, INT4, *fit(ranges.midrange, w, INT4)) != w).mean() > 0.5


@pytest.mark.parametrize('percent', [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys(percent):
  magnitude, spec = np.abs(X), specs.integer(8, (None,))
  want = np.quantile(magnitude, percent / 100, axis=1, method='higher', keepdims=True)
  np.testing.assert_allclose(fit(ranges.Percentile(percent), X, spec)[0], want / 127, rtol=1e-6)
  whole = specs.affine(8, (...,))
  cut = (1 - percent / 100) / 2
  low, high = np.quantile(X, cut, method='lower'), np.quantile(X, 1 - cut, method='higher')
  np.testing.assert_allclose(fit(ranges.Percentile(percent), X, whole)[0][0, 0], (high - low) / 255, rtol=1e-6)


@pytest.mark.parametrize('p', [2.0, 2.4, 1.0])
def test_search_finds_the_best_of_its_ratios(p):
  rule = ranges.Search(p, lowest=0.3, steps=36)
  scale, _ = fit(rule, X, INT4)
  amax = np.abs(BLOCKS).max(-1, keepdims=True).astype(np.float64)

  def errors(scale):
    wrong = BLOCKS - np.clip(np.rint(BLOCKS / scale), -8, 7) * scale
    return (np.abs(wrong) ** p).sum(-1)

  best = np.min([errors(r * amax / 7) for r in np.linspace(1, 0.3, 36)], axis=0)
  np.testing.assert_allclose(errors(np.asarray(scale, np.float64)[..., None]), best, rtol=1e-4)


NAMED = {n: s for n, s in vars(specs).items() if isinstance(s, Spec) and s.block is not None}


@pytest.mark.parametrize('name', NAMED)
def test_search_is_never_worse_than_absmax(name):
  """Of any grid, with scales and zeros on grids of their own."""
  spec, x = NAMED[name], np.concatenate([X, X**3])
  assert error(x, spec, *fit(ranges.Search(), x, spec)) <= error(x, spec, *fit(ranges.absmax, x, spec))


def test_search_around_the_middle_keeps_a_minimum_far_from_zero():
  x = X + 100
  scale, zero = fit(ranges.Search(), x, specs.Q4_1)
  assert error(x, specs.Q4_1, scale, zero) <= error(x, specs.Q4_1, *fit(ranges.absmax, x, specs.Q4_1))
  assert (qarray.decode(zero) > 90).all()


def entropy_by_hand(counts, levels):
  """As NVIDIA's Model Optimizer writes it: loops, digitize, scipy.stats.entropy."""
  counts = counts.copy()
  counts[0] = counts[1]
  divergences = []
  for i in range(levels, len(counts) + 1):
    group = np.digitize(range(i), np.linspace(0, i, levels + 1)) - 1
    group[counts[:i] == 0] = -1
    q = np.zeros(i)
    for g in range(levels):
      if (group == g).any():
        q[group == g] = counts[:i][group == g].sum() / (group == g).sum()
    p = counts[:i].copy()
    p[-1] += counts[i:].sum()
    divergences.append(scipy.stats.entropy(p, q) if q.sum() else np.inf)
  divergences = np.asarray(divergences)
  return divergences, levels + len(divergences) - 1 - int(np.argmin(divergences[::-1]))


@pytest.mark.parametrize('seed', range(4))
def test_entropy_is_the_brute_force(seed):
  rng = np.random.default_rng(seed)
  x = rng.standard_t([2, 3, 5, 50][seed], 20000)
  counts, _ = np.histogram(np.abs(x), bins=256, range=(0, np.abs(x).max()))
  divergences, want = entropy_by_hand(counts.astype(float), 16)
  got = int(jax.jit(histograms.least_divergence, static_argnums=1)(np.float32(counts), 16))
  assert divergences[got - 16] <= divergences[want - 16] * (1 + 1e-4) + 1e-9


def test_entropy_clips_heavy_tails_and_keeps_ends_that_are_full():
  spec = specs.integer(8, (...,))
  heavy = np.random.default_rng(0).standard_t(2, (64, 512)).astype(np.float32)
  assert fit(ranges.Entropy(), heavy, spec)[0] < 0.5 * fit(ranges.absmax, heavy, spec)[0]
  flat = np.random.default_rng(0).uniform(-1, 1, (256, 1024)).astype(np.float32)
  assert fit(ranges.Entropy(), flat, spec)[0] > 0.97 * fit(ranges.absmax, flat, spec)[0]
  assert qarray.decode(fit(ranges.Entropy(), np.abs(heavy), specs.affine(8, (...,)))[1]) == 0


def test_shared_exponents_are_those_of_the_standards():
  amax = np.float32([1, 1.5, 1.7499999, 1.75, 1.9999999, 2, 3.5, 5, 6, 6.0000005, 7, 1e-3, 448, 464, 1e38, 1e-38])
  x = np.zeros((len(amax), 32), np.float32)
  x[:, 3] = -amax
  floor = np.floor(np.log2(amax.astype(np.float64)))
  clip = lambda e: np.exp2(np.clip(e, -126, 127)).astype(np.float32)
  got = {r: np.asarray(qarray.decode(fit(getattr(ranges, r), x, specs.MXFP4)[0]))[:, 0] for r in
         ('ocp_floor', 'ocp_ceil', 'ocp_even', 'absmax')}
  np.testing.assert_array_equal(got['ocp_floor'], clip(floor - 2))
  np.testing.assert_array_equal(got['ocp_ceil'], clip(np.ceil(np.log2(amax.astype(np.float64))) - 2))
  # compressed-tensors: add 1 << 21 to the f32 bits, clear the mantissa.
  rounded = ((amax.view(np.int32) + (1 << 21)) & ~((1 << 23) - 1)).view(np.float32)
  with np.errstate(divide='ignore'):
    np.testing.assert_array_equal(got['ocp_even'], clip(np.log2(rounded.astype(np.float64)) - 2))
  np.testing.assert_array_equal(got['absmax'], clip(np.ceil(np.log2(amax.astype(np.float64) / 6))))
  assert qarray.decode(fit(ranges.ocp_floor, np.zeros((1, 32), np.float32), specs.MXFP4)[0]) == 2.0**-126
  mxfp8 = qarray.decode(fit(ranges.ocp_floor, x, specs.MXFP8)[0])[:, 0]
  np.testing.assert_array_equal(mxfp8, clip(floor - 8))                  # emax of E4M3 is 8, of E2M1 2.


RULES = dict(absmax=ranges.absmax, midrange=ranges.midrange, signed_extreme=ranges.signed_extreme,
             lsq_init=ranges.lsq_init, absmean=ranges.absmean, percentile=ranges.Percentile(99.0),
             search=ranges.Search(2.4, steps=20))


@pytest.mark.parametrize('name', RULES)
def test_rules_give_the_same_bits_eagerly_and_under_jit(name):
  x = X.round(1)                                                         # Full of ties.
  for spec in (INT4, specs.NVFP4, specs.Q4_0):
    for a, b in zip(*(jax.tree.leaves(f(RULES[name])(x, spec)) for f in
                      (lambda r: r, lambda r: jax.jit(r, static_argnums=1))), strict=True):
      np.testing.assert_array_equal(a, b)


def test_rules_are_values():
  assert ranges.Search(2.4) == ranges.Search(2.4) and hash(ranges.Percentile(99.0)) == hash(ranges.Percentile(99.0))
  assert ranges.Search(2.4) != ranges.Search(2.0)


def test_empty_and_constant_blocks_are_harmless():
  x = np.zeros((4, 256), np.float32)
  x[1] = 3
  for rule in RULES.values():
    assert np.isfinite(qarray.fake(x, INT4, *fit(rule, x, INT4))).all()
    assert (qarray.fake(x, INT4, *fit(rule, x, INT4))[0] == 0).all()


def test_rules_say_where_they_do_not_apply():
  with pytest.raises(ValueError, match='midrange on .*needs a signed format without a zero. Use absmax'):
    ranges.midrange(X, specs.affine(4, (32,)))
  with pytest.raises(ValueError, match='half of its scales are negative, and E8M0 starts at'):
    ranges.signed_extreme(X, specs.MXFP4)
  with pytest.raises(ValueError, match=r'Entropy on .*has 128 blocks, and a histogram of 2048 bins describes one'):
    ranges.Entropy()(X, INT4)
  with pytest.raises(ValueError, match=r'101.0 % of the numbers cannot be kept'):
    ranges.Percentile(101.0)
