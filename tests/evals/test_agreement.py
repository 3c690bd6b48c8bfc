"""KL, agreement and their errors against scipy in float64, and llama.cpp's formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from qat.evals import agreement as agreements
from qat.evals import perplexity as ppls

CLASSES = 11
REFERENCE = np.asarray(jax.random.normal(jax.random.key(0), (400, CLASSES)) * 3)
LOGITS = REFERENCE + np.asarray(jax.random.normal(jax.random.key(1), (400, CLASSES)))


def test_kl_is_that_of_scipy():
  got = agreements.agreement(REFERENCE, LOGITS)
  p, q = (scipy.special.softmax(a.astype(np.float64), axis=-1) for a in (REFERENCE, LOGITS))
  want = scipy.stats.entropy(p, q, axis=-1)
  np.testing.assert_allclose(got.kl, want, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(got.mean_kl.value, want.mean(), rtol=1e-5)
  np.testing.assert_allclose(got.median_kl.value, np.median(want), rtol=1e-4)
  np.testing.assert_allclose([got.kl_99_9.value, got.max_kl], [np.quantile(want, 0.999), want.max()], rtol=1e-5)


def test_errors_are_those_of_llama_cpp():
  """mean_and_uncertainty: sqrt((E x^2 - (E x)^2) / (n - 1)); same top p: sqrt(p (1 - p) / (n - 1))."""
  got, n = agreements.agreement(REFERENCE, LOGITS), 400
  want = np.sqrt(((got.kl ** 2).mean() - got.kl.mean() ** 2) / (n - 1))
  np.testing.assert_allclose(got.mean_kl.error, want, rtol=1e-9)
  p = (REFERENCE.argmax(-1) == LOGITS.argmax(-1)).mean()
  assert 0.5 < p < 1 and got.same_top.value == p
  np.testing.assert_allclose(got.same_top.error, np.sqrt(p * (1 - p) / (n - 1)), rtol=1e-9)


@pytest.mark.parametrize('percent', [50, 90])
def test_the_error_of_a_percentile_is_how_much_it_varies(percent):
  draws = np.random.default_rng(0).exponential(size=(400, 500))
  spread = np.percentile(draws, percent, axis=1).std()
  errors = [agreements.percentile(x, percent).error for x in draws[:40]]
  assert 0.9 < np.mean(errors) / spread < 1.1


def test_kl_is_not_symmetric_and_is_zero_for_equal_models():
  sharp = np.float32([[4.0, 0.0]])
  one_way, other_way = agreements.agreement(sharp, sharp * 0), agreements.agreement(sharp * 0, sharp)
  p = np.array([scipy.special.expit(4.0), scipy.special.expit(-4.0)])
  np.testing.assert_allclose(one_way.kl, (p * np.log(2 * p)).sum(), rtol=1e-5)
  np.testing.assert_allclose(other_way.kl, -np.log(2 * p).sum() / 2, rtol=1e-5)
  same = agreements.agreement(REFERENCE, REFERENCE)
  assert same.max_kl == 0 and same.same_top == agreements.Estimate(1.0, 0.0)
  # Adding a number to all logits of a row changes no distribution.
  np.testing.assert_allclose(agreements.agreement(REFERENCE, REFERENCE + 5).kl, 0, atol=1e-5)


def test_classes_that_cannot_occur():
  never = jnp.array([[0.0, 1.0, -jnp.inf]])
  assert agreements.agreement(never, never).max_kl == 0
  some = agreements.agreement(jnp.zeros((4, 3)), jnp.concatenate([never, jnp.zeros((3, 3))]))
  assert some.max_kl == some.mean_kl.value == np.inf and np.isnan(some.mean_kl.error) and some.median_kl.value == 0


class Asked:
  """f32[1, t, v] that notes how many rows are asked for at a time."""

  def __init__(self, logits, counts):
    self.logits, self.counts, self.shape = logits, counts, logits.shape

  def __getitem__(self, index):
    rows = self.logits[index]
    self.counts.append(len(rows))
    return rows


def test_logits_of_a_long_window_are_never_whole():
  tables, counts = jax.random.normal(jax.random.key(2), (2, 7, 7)) * 2, []
  protocol = ppls.Protocol('random', 2, 150, 100)
  tokens = protocol.cut(np.random.default_rng(0).integers(0, 7, 250))
  whole = [lambda tokens, table=table: table[tokens] for table in tables]
  asked = [lambda tokens, f=f: Asked(f(tokens), counts) for f in whole]
  got, want = (agreements.on_text(*functions, tokens, protocol) for functions in (asked, whole))
  assert counts[::2] == counts[1::2] == [64, 64, 21, 64, 36]              # 149 and 100 of them, by ppls.POSITIONS.
  np.testing.assert_array_equal(got.kl, want.kl)
  np.testing.assert_array_equal(got.reference.losses, ppls.perplexity(asked[0], tokens, protocol).losses)
  windows = [protocol.targets, protocol.stride]
  logits = np.concatenate([tables[0][row[:-1][-k:]] for row, k in zip(tokens, windows)])
  targets = np.concatenate([row[-k:] for row, k in zip(tokens, windows)])
  np.testing.assert_allclose(got.reference.losses, -scipy.special.log_softmax(np.float64(logits), axis=-1)[
      np.arange(len(targets)), targets], rtol=1e-4, atol=1e-5)


def test_two_models_on_one_text():
  tables = jax.random.normal(jax.random.key(2), (7, 7)) * 2
  noisy = tables + jax.random.normal(jax.random.key(3), (7, 7)) * 0.1
  reference_fn, logits_fn = (jax.jit(lambda tokens, table=table: table[tokens]) for table in (tables, noisy))
  protocol = ppls.Protocol('random', 6, 16, 8, bos=0)
  tokens = protocol.cut(np.random.default_rng(0).integers(0, 7, 60))
  got = agreements.on_text(reference_fn, logits_fn, tokens, protocol)
  for side, f in ((got.reference, reference_fn), (got.quantized, logits_fn)):
    alone = ppls.perplexity(f, tokens, protocol)
    np.testing.assert_array_equal(side.losses, alone.losses)
    assert side.count == alone.count
  rows = np.concatenate([np.r_[0, row[:-1]][-k:] for row, k in zip(tokens, (16, 8, 8, 8, 8, 8))])
  p, q = (scipy.special.softmax(np.asarray(t, np.float64)[rows], axis=-1) for t in (tables, noisy))
  np.testing.assert_allclose(got.kl, scipy.stats.entropy(p, q, axis=-1), rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(np.exp(got.log_ratio.value), got.quantized.ppl / got.reference.ppl, rtol=1e-9)
  # llama.cpp: var(ln PPL(Q)) + var(ln PPL) - 2 cov, all over n - 1.
  cov = np.cov(got.quantized.losses, got.reference.losses) / len(rows)
  np.testing.assert_allclose(got.log_ratio.error, np.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]), rtol=1e-6)
  assert got.log_ratio.error < 0.2 * got.reference.error / got.reference.ppl  # What pairing is for.
  assert got.plain()['protocol']['predicted'] == 56 and str(protocol) in str(got)


def test_wrong_input():
  with pytest.raises(ValueError, match=r'shapes \(400, 11\) and \(399, 11\)'):
    agreements.agreement(REFERENCE, LOGITS[1:])
  with pytest.raises(ValueError, match='at least one row'):
    agreements.agreement(REFERENCE[:0], LOGITS[:0])
  with pytest.raises(ValueError, match='NaN from row 7 on'):
    agreements.agreement(REFERENCE, np.where(np.arange(400)[:, None] == 7, np.nan, LOGITS))


def test_one_row_has_no_error():
  one = agreements.agreement(REFERENCE[:1], LOGITS[:1])
  assert np.isnan(one.mean_kl.error) and np.isnan(one.same_top.error) and np.isnan(one.kl_99_9.error)
