"""Scales trained on a network's outputs: nearer to the float network, the same codes, and the paper's gradient."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import qarray
from qat.models import mlp
from qat.ptq import end_to_end

call = lambda model, batch: model(batch)


def networks(recipe='w2a16'):
  floats = mlp.MLP((8, 16, 5), nnx.Rngs(0))
  return floats, qat.freeze(qat.quantize(floats, qat.recipes.get(recipe)))


def batches():
  return [jax.random.normal(jax.random.key(i), (16, 8)) for i in range(2)]


@pytest.mark.parametrize('distance', [end_to_end.divergence, end_to_end.squares])
def test_distances_fall_and_codes_stay(distance):
  floats, frozen = networks()
  before = [np.asarray(a) for a in jax.tree.leaves(nnx.state(frozen))]
  settings = end_to_end.Settings(60, 1e-2, distance=distance)
  tuned, history = end_to_end.tune(frozen, floats, batches(), call, settings)
  measured = np.mean([distance(floats(x), tuned(x)) for x in batches()])
  assert measured == pytest.approx(min(history), rel=1e-4) and min(history) < 0.9 * history[0]
  for a, b in zip(before, jax.tree.leaves(nnx.state(frozen))):             # The model that was given stays.
    np.testing.assert_array_equal(a, b)
  for mine, theirs in zip(tuned.layers, frozen.layers):
    mine, theirs = (vars(layer)['kernel'].get_value() for layer in (mine, theirs))
    np.testing.assert_array_equal(mine.codes, theirs.codes)
    assert not np.array_equal(mine.scale, theirs.scale)


def test_rates_that_only_harm_leave_the_start():
  floats, frozen = networks()
  tuned, history = end_to_end.tune(frozen, floats, batches(), call, end_to_end.Settings(4, 100.0, 2))
  assert history[0] == min(history)
  np.testing.assert_array_equal(tuned(batches()[0]), frozen(batches()[0]))


def test_kl_is_that_of_scipy():
  p, q = np.random.default_rng(0).normal(size=(2, 3, 4))
  softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  want = (softmax(p) * np.log(softmax(p) / softmax(q))).sum(-1).mean()
  assert float(end_to_end.divergence(jnp.float32(p), jnp.float32(q))) == pytest.approx(want, rel=1e-5)


def test_scales_on_a_grid_are_refused():
  floats = mlp.MLP((32, 32), nnx.Rngs(0))
  frozen = qat.freeze(qat.quantize(floats, qat.recipes.get('mxfp4')))
  assert isinstance(vars(frozen.layers[0])['kernel'].get_value().scale, qarray.QArray)
  with pytest.raises(ValueError, match='scales are floats'):
    end_to_end.tune(frozen, floats, [jnp.ones((2, 32))], call)
