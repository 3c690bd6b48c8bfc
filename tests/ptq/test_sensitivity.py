"""Sensitivities against exact Hessians, gradients by hand and whole models; and what they are good for."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from qat.core import specs
from qat.evals import agreement
from qat.models import mlp
from qat.nn import recipes, rules, transform, weights
from qat.ptq import allocate, sensitivity
from qat.quantizers import lsq, static, ste
from tests.nn import zoo
from tests.ptq import test_allocate as brute_force

WEIGHT_ONLY = {name: [rules.Rule('.*', ste.STE(specs.integer(bits, (None, 1))))] for name, bits in
               (('w2', 2), ('w3', 3), ('w4', 4), ('w8', 8))}
FLOAT = {'float': recipes.get('float')}
SMALL = {'w2': WEIGHT_ONLY['w2'], 'w4': WEIGHT_ONLY['w4'], **FLOAT}


def squared(model, batch):
  return (model(batch) ** 2).mean()


def small():
  """A net of two layers, and batches."""
  model = mlp.MLP((4, 5, 3), nnx.Rngs(0))
  return model, list(jax.random.normal(jax.random.key(1), (2, 16, 4)))


def errors(model, candidate):
  """{path: Q(W) - W}, by freezing the model."""
  frozen = transform.freeze(transform.quantize(model, candidate))
  decoded = {s.path: s.layout.from_matrix(weights.decode(s.variable.get_value(), jnp.float32))
             for s in rules.sites(frozen)}
  return {s.path: decoded[s.path] - s.variable.get_value() for s in rules.sites(model)}


def by_weights(model, batches):
  """(f, values): the mean loss over batches as a function of [kernels], and the kernels."""
  def f(kernels):
    here = nnx.clone(model)
    for layer, kernel in zip(here.layers, kernels):
      layer.kernel = nnx.Param(kernel)
    return jnp.mean(jnp.stack([squared(here, b) for b in batches]))
  return f, [layer.kernel[...] for layer in model.layers]


def test_the_trace_of_a_diagonal_hessian_is_exact_for_each_probe():
  """sum a w^2 has the Hessian diag(2 a), and v^T diag(2 a) v is its trace for any signs v."""
  model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  a = jnp.arange(12.0).reshape(3, 4)
  loss = lambda model, batch: jnp.sum(a * model.kernel[...] ** 2) * batch
  found = sensitivity.hessian_traces(model, [jnp.float32(1), jnp.float32(3)], loss, probes=3)
  np.testing.assert_allclose(found[''], [132.0] * 3 + [396.0] * 3, rtol=1e-6)


def test_the_trace_of_a_small_net_is_that_of_its_hessian():
  model, batches = small()
  f, kernels = by_weights(model, batches)
  H = jax.jit(jax.hessian(f))(kernels)
  found = sensitivity.hessian_traces(model, batches, squared, probes=200)
  for i, (kernel, estimates) in enumerate(zip(kernels, found.values())):
    exact = np.trace(np.asarray(H[i][i]).reshape(kernel.size, kernel.size))
    assert estimates.shape == (400,)
    assert abs(estimates.mean() - exact) < 3 * estimates.std() / np.sqrt(400) + 1e-6
    assert estimates.std() / np.sqrt(400) < 0.05 * exact
  got = sensitivity.hessian(model, SMALL, batches, squared, probes=200)
  for name in ('w2', 'w4'):
    for path, error in errors(model, SMALL[name]).items():
      np.testing.assert_allclose(got[path][name], found[path].mean() / error.size * np.sum(error**2), rtol=1e-5)
  assert {row['float'] for row in got.values()} == {0.0}


def test_a_negative_trace_costs_nothing():
  model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  loss = lambda model, batch: -jnp.sum(model.kernel[...] ** 2)
  assert sensitivity.hessian(model, SMALL, [0], loss, probes=1) == {'': dict.fromkeys(SMALL, 0.0)}


def test_fisher_and_gradient_by_hand():
  model, batches = small()
  _, kernels = by_weights(model, batches)
  gradients = [jax.jit(jax.grad(by_weights(model, [b])[0]))(kernels) for b in batches]
  fisher = sensitivity.fisher(model, SMALL, batches, squared)
  gradient = sensitivity.gradient(model, SMALL, batches, squared)
  for name in ('w2', 'w4'):
    for i, (path, dw) in enumerate(errors(model, SMALL[name]).items()):
      g = np.stack([np.asarray(gs[i], np.float64) for gs in gradients])
      np.testing.assert_allclose(fisher[path][name], np.sum((g**2).mean(0) * np.asarray(dw)**2), rtol=1e-4)
      np.testing.assert_allclose(gradient[path][name], np.abs(g.mean(0) * np.asarray(dw)).sum(), rtol=1e-4)
  assert fisher['layers/0']['w2'] > fisher['layers/0']['w4'] > fisher['layers/0']['float'] == 0


def test_divergence_and_noise_are_those_of_a_model_with_one_layer_quantized():
  model, batches = small()
  candidates = SMALL | {'w4a4': recipes.get('w4a4'), 'lsq': recipes.learned(4, 8)}
  kl = sensitivity.divergence(model, candidates, batches)
  noise = sensitivity.noise(model, candidates, batches)
  run = nnx.jit(lambda m, x: m(x))
  reference = np.concatenate([run(model, b) for b in batches])
  for path in ('layers/0', 'layers/1'):
    for name in ('w2', 'w4a4', 'lsq'):
      one = transform.quantize(model, recipes.at(path, candidates[name])[-1:])
      if name == 'lsq':
        one = sensitivity.calibrate.calibrate(one, batches)
      outputs = np.concatenate([run(one, b) for b in batches])
      np.testing.assert_allclose(kl[path][name], agreement.agreement(reference, outputs).mean_kl.value, rtol=1e-3)
      energy = lambda y: (np.asarray(y, np.float64)**2).sum()
      np.testing.assert_allclose(noise[path][name], energy(outputs - reference) / energy(reference), rtol=1e-4)
    assert kl[path]['float'] == noise[path]['float'] == 0
    assert kl[path]['w4a4'] > kl[path]['w4'] > 0  # Inputs are seen.


@pytest.mark.parametrize('name', ['scanned', 'shared', 'tied', 'containers', 'oddities'])
def test_models_of_every_structure(name):
  with jax.numpy_dtype_promotion('standard'):  # Their own arithmetic is not strict.
    check_structure(name)


def check_structure(name):
  model, x = zoo.MODELS[name](nnx.Rngs(0)), zoo.example(name)
  before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
  costs = {f.__name__: f(model, SMALL, [x], squared) for f in (sensitivity.fisher, sensitivity.gradient)}
  costs |= {'hessian': sensitivity.hessian(model, SMALL, [x], squared, probes=2),
            'noise': sensitivity.noise(model, SMALL, [x])}
  for measure, found in costs.items():
    assert list(found) == list(allocate.places(model)), measure
    assert np.isfinite([list(row.values()) for row in found.values()]).all(), measure
    assert all(row['float'] < 1e-12 for row in found.values()), measure  # Two programs may round differently.
  assert all(row['w2'] > row['w4'] > 0 for row in costs['noise'].values())
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), before)
  assert not transform.quantized.layers(model)


def test_all_layers_of_weights_run_one_program():
  calls = []

  def apply(model, x):
    calls.append(1)  # Once a trace.
    return model(x)

  model, batches = mlp.MLP((4, 4, 4, 4, 4), nnx.Rngs(0)), small()[1]
  sensitivity.noise(model, SMALL, batches, apply)
  assert len(calls) == 2  # The float outputs, and the comparison with them.


def test_same_seed_same_costs():
  model, batches = small()
  cost = functools.partial(sensitivity.hessian, model, SMALL, batches, squared, probes=2)
  assert cost(seed=3) == cost(seed=3) != cost(seed=4)


def test_no_batch():
  model, _ = small()
  for f in (sensitivity.hessian, sensitivity.fisher, sensitivity.gradient):
    with pytest.raises(ValueError, match='given no batch'):
      f(model, SMALL, [], squared)
  with pytest.raises(ValueError, match='given no batch'):
    sensitivity.noise(model, SMALL, iter([]))


def test_an_input_quantizer_that_needs_a_range_is_calibrated():
  model, batches = small()
  fixed = [rules.Rule('.*', WEIGHT_ONLY['w8'][0].weight, static.Static(specs.integer(3, specs.TENSOR)))]
  got = sensitivity.noise(model, {'w8a3': fixed, **WEIGHT_ONLY}, batches)
  assert all(row['w8a3'] > 10 * row['w8'] for row in got.values())
  assert isinstance(recipes.learned(4, 8)[0].input, lsq.LSQ)


# ------------------------------------------------------------------------ what it is for

SIZES = (64, 32, 32, 32, 32, 32, 32, 32, 10)  # Eight layers.


@functools.cache
def digits():
  """A net of eight layers trained on 1,297 digits, and (train, test) images and labels."""
  data = datasets.load_digits()
  order = np.random.default_rng(123).permutation(len(data.target))
  x, y = jnp.asarray(data.data[order] / 16, jnp.float32), jnp.asarray(data.target[order], jnp.int32)
  train, test = (x[500:], y[500:]), (x[:500], y[:500])
  graph, params = nnx.split(mlp.MLP(SIZES, nnx.Rngs(0)))
  tx = optax.adam(3e-3)

  @jax.jit
  def fit(params):
    def step(carry, key):
      params, state = carry
      rows = jax.random.choice(key, len(train[0]), (64,))
      grads = jax.grad(lambda p: loss_of(nnx.merge(graph, p), (train[0][rows], train[1][rows])))(params)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None
    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(0), 1500))[0][0]

  with jax.numpy_dtype_promotion('standard'):  # Adam's.
    return nnx.merge(graph, fit(params)), train, test


def loss_of(model, batch):
  return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()


@functools.cache
def losses():
  """A function: {path: name of a candidate} -> the mean loss on the training digits."""
  model, train, _ = digits()
  graph, state = nnx.split(model)
  kernels = {path: site.variable.get_value() for path, site in allocate.places(model).items()}
  table = {name: {p: kernels[p] + e for p, e in errors(model, c).items()} for name, c in WEIGHT_ONLY.items()}

  @jax.jit
  def run(kernels):
    here = nnx.merge(graph, state, copy=True)
    for path, site in allocate.places(here).items():
      site.variable.set_value(kernels[path])
    return loss_of(here, train)

  return lambda choice: float(run({path: table[name][path] for path, name in choice.items()}))


def random_allocations(sizes, bits, count):
  """Choices that take between 97 % of `bits` and all of it."""
  rng, found = np.random.default_rng(0), []
  while len(found) < count:
    choice = {path: str(rng.choice(list(row))) for path, row in sizes.items()}
    if 0.97 * bits <= sum(sizes[p][c].bits for p, c in choice.items()) <= bits:
      found.append(choice)
  return found


def measured(measure):
  model, train, _ = digits()
  examples = [(train[0][i:i + 1], train[1][i:i + 1]) for i in range(128)]
  batches = [(train[0][:512], train[1][:512])]
  return {'hessian': lambda: sensitivity.hessian(model, WEIGHT_ONLY, batches, loss_of, probes=64),
          'fisher': lambda: sensitivity.fisher(model, WEIGHT_ONLY, examples, loss_of),
          'gradient': lambda: sensitivity.gradient(model, WEIGHT_ONLY, batches, loss_of),
          'divergence': lambda: sensitivity.divergence(model, WEIGHT_ONLY, [batches[0][0]]),
          'noise': lambda: sensitivity.noise(model, WEIGHT_ONLY, [batches[0][0]])}[measure]()


@pytest.mark.parametrize('measure', ['hessian', 'fisher', 'gradient', 'divergence', 'noise'])
def test_the_mixed_recipe_beats_random_allocations_of_equal_bits(measure):
  """By more than 3 standard errors of their mean; and it is the best of all 4^8 by its own costs."""
  model, train, _ = digits()
  costs, sizes = measured(measure), allocate.sizes(model, WEIGHT_ONLY)
  budget = allocate.BitsPerWeight(4.5)  # About one of them is of scales.
  bits = budget.bits(sum(row['w2'].weights for row in sizes.values()))
  choice = allocate.allocate(costs, sizes, budget)
  cost, _ = brute_force.cost_and_bits(choice, costs, sizes)
  np.testing.assert_allclose(cost, brute_force.least(costs, sizes, bits), rtol=1e-9)
  ours, by_chance = losses()(choice), [losses()(c) for c in random_allocations(sizes, bits, 50)]
  assert ours < np.mean(by_chance) - 3 * np.std(by_chance) / np.sqrt(50)
  recipe = allocate.recipe(choice, WEIGHT_ONLY, model)
  quantized = nnx.jit(loss_of)(transform.quantize(model, recipe), train)
  np.testing.assert_allclose(quantized, ours, rtol=1e-5)
