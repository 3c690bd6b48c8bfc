"""Fidelity of weights and outputs, in models of every structure, against what can be computed by hand."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.evals import layerwise
from qat.nn import recipes, rules, transform
from qat.quantizers import ste
from tests.nn import zoo

SPEC = specs.integer(4, (None, 1))


class Two(nnx.Module):

  def __init__(self):
    self.first, self.second = (nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2))

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


def sqnr(x, y):
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return 10 * np.log10((x**2).sum() / ((x - y)**2).sum())


@pytest.mark.parametrize('frozen', [False, True])
def test_two_layers_by_hand(frozen):
  model, x = Two(), zoo.example('two')
  q = transform.quantize(model, [rules.Rule('.*', ste.STE(SPEC))])
  q = transform.freeze(q) if frozen else q
  w, v = (layer.kernel[...] for layer in (model.first, model.second))
  w_hat, v_hat = (qarray.fake(a, SPEC) for a in (w, v))
  got = layerwise.of_weights(model, q)
  np.testing.assert_allclose([got['first'].sqnr_db, got['second'].sqnr_db], [sqnr(w, w_hat), sqnr(v, v_hat)], rtol=1e-6)
  got = layerwise.of_outputs(model, q, x)
  a, a_hat = x @ w, x @ w_hat
  b, b_hat = nnx.relu(a) @ v, nnx.relu(a_hat) @ v_hat
  first, second = got['first'], got['second']
  np.testing.assert_allclose([first.sqnr_db, second.sqnr_db], [sqnr(a, a_hat), sqnr(b, b_hat)], rtol=1e-4)
  cosine = lambda a, b: np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
  np.testing.assert_allclose([first.cosine, second.cosine], [cosine(a, a_hat), cosine(b, b_hat)], rtol=1e-5)


def test_uniform_numbers_have_six_decibels_a_bit():
  """Bennett: 6.02 b dB for numbers uniform over the grid's range of 2^b levels."""
  x = np.random.default_rng(0).uniform(-1, 1, 20000)
  for bits in (4, 8):
    step = 2 / 2**bits
    got = layerwise.fidelity(x, np.clip(np.floor(x / step), -2**(bits - 1), 2**(bits - 1) - 1) * step + step / 2)
    np.testing.assert_allclose(got.sqnr_db, 20 * bits * np.log10(2), atol=0.1)


def test_arrays_without_numbers():
  assert layerwise.fidelity(np.zeros(3), np.zeros(3)) == layerwise.Fidelity(np.inf, 1.0)
  assert layerwise.fidelity(np.zeros(3), np.ones(3)) == layerwise.Fidelity(-np.inf, 0.0)
  assert layerwise.fidelity(np.ones(3), np.zeros(3)) == layerwise.Fidelity(0.0, 0.0)
  with pytest.raises(ValueError, match='fidelity of 2 numbers to 3'):
    layerwise.fidelity(np.ones(3), np.ones(2))


@pytest.mark.parametrize('name', zoo.MODELS)
def test_models_of_every_structure(name):
  model, x = zoo.MODELS[name](nnx.Rngs(0)), zoo.example(name)
  q = transform.quantize(model, recipes.weight_only(8))
  got = layerwise.of_outputs(model, q, x)
  paths = {path.split('[')[0].removesuffix('/attend') for path in got}
  reached = {s.path for s in rules.sites(model) if s.kind not in ('Param', 'Attention')}
  if name == 'other methods':  # Its second layer is never called: only its kernel is read.
    reached -= {'second'}
  assert paths == reached
  assert all(20 < f.sqnr_db < 70 and 0.99 < f.cosine <= 1.0001 for f in got.values())
  by_weights = layerwise.of_weights(model, q)
  assert all(30 < f.sqnr_db < 70 for f in by_weights.values())
  assert {p.split('[')[0] for p in by_weights} >= paths


def test_stacked_layers_are_told_apart():
  model, x = zoo.Scanned(nnx.Rngs(0)), zoo.example('scanned')
  found, lead = layerwise.outputs(model, x)['blocks/linear']
  assert found.shape == (3, 6, zoo.WIDTH) and lead == 1
  h = x
  for i in range(3):
    block = nnx.merge(nnx.graphdef(model.blocks), jax.tree.map(lambda a: a[i], nnx.state(model.blocks)))
    np.testing.assert_allclose(found[i], block.linear(block.norm(h)), rtol=1e-5, atol=1e-5)
    h = block(h)
  got = layerwise.of_weights(model, transform.quantize(model, recipes.weight_only(3)))
  w = model.blocks.linear.kernel[...][2]
  want = sqnr(w, qarray.fake(w, specs.integer(3, (None, 1))))
  np.testing.assert_allclose(got['blocks/linear[2]'].sqnr_db, want, rtol=1e-2)  # Its recipe searches its range.
  assert len({f.sqnr_db for f in got.values()}) == 6


def test_a_tied_head_is_a_layer_of_its_own():
  model = zoo.Tied(nnx.Rngs(0))
  found = layerwise.outputs(model, jnp.arange(5))
  assert {path: y.shape for path, (y, _) in found.items()} == {'embed': (5, zoo.WIDTH), 'embed/attend': (5, 16)}


def test_the_models_stay_as_they_are():
  model = Two()
  graph, state = nnx.split(model)
  layerwise.of_outputs(model, model, zoo.example('two'))
  assert nnx.graphdef(model) == graph
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), state)


def test_wrong_pairs():
  model = Two()
  frozen = transform.freeze(transform.quantize(model, recipes.weight_only(4)))
  with pytest.raises(ValueError, match="Layer 'first' is frozen in the float model"):
    layerwise.of_weights(frozen, frozen)
  with pytest.raises(ValueError, match="Layer 'first' is not there in the float model"):
    layerwise.of_weights(zoo.Tied(nnx.Rngs(0)), frozen)
  with pytest.raises(ValueError, match=r"layers \['first', 'layers/0', 'layers/2', 'second'\] are reached in one"):
    layerwise.of_outputs(nnx.Sequential(model.first, nnx.relu, model.second), frozen, zoo.example('two'))
