"""AWQ: the searches against slow ones in numpy, and the model's outputs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import qarray, ranges, specs
from qat.ptq import awq, channels, links, smooth
from qat.ptq.moments import Moments
from tests.ptq import tiny

INT3 = specs.integer(3, (8, 1))


@functools.cache
def problem():
  """Correlated inputs of which some are large, and two weights that read them."""
  draw = np.random.default_rng(0)
  x = draw.normal(size=(200, 16)) @ draw.normal(size=(16, 16)) * np.where(np.arange(16) % 5, 1, 12)
  ws = [jnp.asarray(draw.normal(size=(16, o)), jnp.float32) for o in (6, 4)]
  return x, ws, Moments.of(jnp.asarray(x, jnp.float32))


def output_error(x, w, w_hat):
  return np.mean(np.sum((x @ (np.asarray(w_hat, np.float64) - np.asarray(w, np.float64))) ** 2, -1))


def nearest(w, spec):
  return qarray.fake(jnp.asarray(w, jnp.float32), spec)


def test_the_search_finds_what_a_slow_one_finds():
  x, ws, moments = problem()
  s = np.asarray(awq.search(ws, moments, INT3))
  errors = []
  for n in range(20):
    t = np.maximum(np.abs(x).mean(0) ** (n / 20), 1e-4)
    t /= np.sqrt(t.max() * t.min())
    errors.append((sum(output_error(x, w, np.asarray(nearest(w * t[:, None], INT3)) / t[:, None]) for w in ws), n, t))
  best = min(errors, key=lambda e: e[:2])
  assert best[1] > 0 and best[0] < 0.8 * errors[0][0]
  np.testing.assert_allclose(s, best[2], rtol=1e-4)


@pytest.mark.parametrize('spec', [INT3, specs.kernel(specs.MXFP4), specs.affine(2, (32, 1))], ids=str)
def test_never_worse_than_nearest(spec):
  for seed in range(5):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(100, 32)) * np.exp(draw.normal(size=32))
    w = jnp.asarray(draw.normal(size=(32, 8)), jnp.float32)
    s = np.asarray(awq.search([w], Moments.of(jnp.asarray(x, jnp.float32)), spec))[:, None]
    assert output_error(x, w, nearest(w * s, spec) / s) <= output_error(x, w, nearest(w, spec)) * (1 + 1e-5)


CLIPPED = [INT3, specs.integer(3, (16, 1)), specs.integer(3, (...,)), specs.affine(3, (8, 1)), specs.integer(3, (8, 2)),
           specs.kernel(qarray.Spec(INT3.format, qat.Flat(8)))]


@pytest.mark.parametrize('spec', CLIPPED, ids=str)
def test_the_clip_search_finds_what_a_slow_one_finds(spec):
  x, (w, _), moments = problem()
  scale, _ = awq.clip(w, moments, spec)
  low, high = ranges.extent(w, spec)
  rows = 8 if isinstance(spec.block, qat.Flat) else w.shape[0] if spec.block[0] is ... else spec.block[0]
  H = np.asarray(moments.H, np.float64)
  best = np.full(low.shape, np.inf)
  chosen = np.zeros(low.shape)
  for r in [1 - i / 20 for i in range(10)]:
    s, z = qarray.from_range(*ranges.shrink(low, high, jnp.full(low.shape, r, jnp.float32), spec), spec)
    wrong = np.asarray(qarray.fake(w, spec, s, z), np.float64) - np.asarray(w, np.float64)
    each = np.stack([np.einsum('io,ij,jo->o', d := wrong[a:a + rows], H[a:a + rows, a:a + rows], d)
                     for a in range(0, 16, rows)])                       # [16 / rows, o]
    if low.ndim == 1:
      each = each.T.reshape(-1)
    else:
      each = each.reshape(*low.shape, -1).sum(-1)
    better = each < best
    best, chosen = np.where(better, each, best), np.where(better, np.asarray(s), chosen)
  np.testing.assert_allclose(scale, chosen, rtol=1e-6)
  assert (chosen < np.asarray(qarray.from_range(low, high, spec)[0]) * 0.99).any()


def test_a_grid_that_cannot_be_clipped():
  x, (w, _), moments = problem()
  with pytest.raises(ValueError, match='across its outputs'):
    awq.clip(w, moments, qarray.Spec(INT3.format, qat.Flat(8)))


def test_clipped_is_a_solver():
  x, (w, _), moments = problem()
  q, notes = awq.Clipped()(w, moments, INT3)
  assert notes == {} and q.shape == w.shape
  assert output_error(x, w, qarray.decode(q)) < output_error(x, w, nearest(w, INT3))


@functools.cache
def llama_links():
  return links.find(tiny.llama(), tiny.TOKENS) + links.resolve(
      tiny.llama(), [links.heads(8), links.GATED], tiny.TOKENS)


def gathered(model, link_set):
  """Moments with the right largest |x| and mean |x|, and a diagonal H."""
  paths = [t for link in link_set for t in link.targets]
  seen = smooth.largest(model, paths, [tiny.TOKENS])
  return {p: Moments(jnp.int32(1), jnp.diag(x * x), x, x) for p, x in seen.items()}


def test_a_model():
  model, found = tiny.llama(), llama_links()
  moments = gathered(model, found)
  other, after = awq.awq(model, moments, found, specs.integer(3, (8, 1)))
  assert links.distance(model, other, tiny.TOKENS) < 1e-5
  fresh = gathered(other, found)                                          # Moments of its own inputs.
  for path, m in after.items():
    np.testing.assert_allclose(m.largest, fresh[path].largest, rtol=1e-3)
    np.testing.assert_allclose(m.H, fresh[path].H, rtol=2e-3, atol=1e-6)
  changed = [link for link in found if (channels.inputs(channels.find(model, link.targets[0]), '')
                                        != channels.inputs(channels.find(other, link.targets[0]), '')).any()]
  assert len(changed) > len(found) / 2
  o = channels.find(other, 'blocks/0/attention/o').kernel[...] / model.blocks[0].attention.o.kernel[...]
  np.testing.assert_allclose(o.reshape(2, 2, 8, 24)[:, 0], o.reshape(2, 2, 8, 24)[:, 1], rtol=1e-4)


def test_moments_that_are_missing():
  with pytest.raises(ValueError, match=r"no moments of \['blocks/0/attention/q'"):
    awq.awq(tiny.llama(), {}, llama_links(), INT3)


def test_dead_inputs():
  draw = np.random.default_rng(1)
  x = jnp.asarray(draw.normal(size=(50, 8)) * (np.arange(8) > 1), jnp.float32)
  s = awq.search([jnp.asarray(draw.normal(size=(8, 4)), jnp.float32)], Moments.of(x), specs.integer(2, (8, 1)))
  assert np.isfinite(np.asarray(s)).all() and (np.asarray(s) > 0).all()
  none = awq.search([jnp.ones((8, 4))], Moments.zeros(8), specs.integer(2, (8, 1)))
  np.testing.assert_array_equal(none, 1)
