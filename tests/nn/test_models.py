"""Any NNX model: quantized without an edit, trained, frozen, and the same in every transformation."""

import copy
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qat
from qat.core import specs
from qat.models import encoder
from qat.nn import explain, recipes
from qat.quantizers import base, lsq, stochastic
from qat.quantizers.ste import STE
from tests.nn import zoo

INPUT = STE(specs.integer(8, specs.TOKEN))
WEIGHTS = {'channel': STE(specs.integer(4, specs.CHANNEL)), 'tensor': STE(specs.integer(4, specs.TENSOR)),
           'nested scales': STE(specs.kernel(specs.NF4_DQ)), 'learned': lsq.LSQ(specs.integer(4, specs.TENSOR)),
           'random': stochastic.StochasticRounding(specs.integer(4, specs.CHANNEL))}
# Recipes other than the first are for models where layers share one array.
STACKED = ('scanned', 'ensemble')
CASES = [(name, 'channel') for name in zoo.MODELS] + [(n, w) for n in STACKED for w in WEIGHTS if w != 'channel']
cases = pytest.mark.parametrize('name, weight', CASES)
dtypes = pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])


def recipe(weight):
  return (qat.Rule('.*', WEIGHTS[weight], INPUT, scores=STE(specs.integer(8, specs.TENSOR))),)


@nnx.jit
def run(models, xs):
  return {key: model(xs[key]) for key, model in models.items()}


@nnx.jit
def learn(models, xs):
  value = lambda model, x: jnp.sum(jnp.sin(model(x).astype(jnp.float32)))
  floats = nnx.DiffState(0, lambda path, p: isinstance(p, nnx.Param) and jnp.issubdtype(p[...].dtype, jnp.floating))
  return {key: nnx.grad(value, argnums=floats)(model, xs[key]) for key, model in models.items()}


@functools.cache
def results(dtype):
  """Quantized models, inputs, outputs, and those of the frozen models."""
  dtype = jnp.dtype(dtype)
  key = lambda name, weight: f'{name}, {weight}'
  floats = nnx.Dict({key(n, w): zoo.MODELS[n](nnx.Rngs(0), dtype=dtype) for n, w in CASES})
  floats.eval()
  models = nnx.Dict({key(n, w): qat.quantize(floats[key(n, w)], recipe(w)) for n, w in CASES})
  xs = {key(n, w): zoo.example(n, dtype) for n, w in CASES}
  frozen = nnx.Dict({k: qat.freeze(m) for k, m in models.items()})
  return models, xs, run(nnx.clone(models), xs), run(frozen, xs)


@functools.cache
def gradients():
  models, xs, *_ = results('float32')
  return learn(nnx.clone(models), xs)


@cases
@dtypes
def test_frozen_is_trained_bit_for_bit(name, weight, dtype):
  *_, ys, served = results(dtype)
  got, want = (np.asarray(a[f'{name}, {weight}'], np.float32) for a in (served, ys))
  np.testing.assert_array_equal(got, want)
  assert np.isfinite(want).all() and want.any()


@pytest.mark.parametrize('name', ['w8a8', 'w2a2_lsq', pytest.param('w4a8_static', marks=pytest.mark.slow)])
def test_additions_around_quantized_layers_are_the_same_in_both_programs(name):
  """Sums of embeddings, residuals and norms are floats, which LLVM may contract in one program and not in another."""
  config = encoder.Config(vocab_size=50, context_length=6, width=24, layers=1, heads=3, ffn_width=40)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 6)), jnp.int32)
  model = qat.calibrate(qat.quantize(encoder.Encoder(config, nnx.Rngs(0)), recipes.get(name)), [tokens])
  y, served = (nnx.jit(lambda m: m(tokens))(m) for m in (model, qat.freeze(model)))
  np.testing.assert_array_equal(y, served)


@cases
def test_gradients_reach_every_float_weight(name, weight):
  models, *_ = results('float32')
  key = f'{name}, {weight}'
  named = {path for path in explain.quantized_weights(models[key])}
  assert named
  for path, g in nnx.to_flat_state(gradients()[key]):
    assert np.isfinite(np.asarray(g[...], np.float32)).all()
    if set(path) & {'kernel', 'p', 'embedding', 'down', 's'}:
      assert np.asarray(g[...]).any(), path


@pytest.mark.parametrize('name', [n for n in zoo.MODELS if n not in ('attention', 'tied')])
def test_the_output_is_the_float_models_on_the_weights_grid(name):
  """Every weight of these models sums its second last axis; the channels' grid is recomputed here."""
  float_model = zoo.MODELS[name](nnx.Rngs(0))
  float_model.eval()
  model = qat.quantize(float_model, (qat.Rule('.*', WEIGHTS['channel']),))
  on_grid = nnx.clone(float_model)
  for path, p in nnx.to_flat_state(nnx.state(on_grid, nnx.Param)):
    w = np.asarray(p[...])
    if set(path) & {'kernel', 'p', 'down', 'params'}:
      scale = np.abs(w).max(-2, keepdims=True) / np.float32(7)
      p[...] = jnp.asarray(np.clip(np.round(w * (1 / scale)), -8, 7) * scale)
  np.testing.assert_allclose(model(zoo.example(name)), on_grid(zoo.example(name)), rtol=2e-5, atol=2e-5)


def test_the_float_model_stays_as_it_was():
  model = zoo.Shared(nnx.Rngs(0))
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
  qat.freeze(qat.quantize(model, recipe('channel')))(zoo.example('shared'))
  assert type(model.a) is nnx.Linear
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


def test_params_keep_their_paths_and_their_floats():
  model = zoo.Containers(nnx.Rngs(0))
  quantized = qat.quantize(model, recipe('channel'))
  # A list of Params with quantizers has string keys in its state: '0', not 0.
  before, after = ({'/'.join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(m, nnx.Param))}
                   for m in (model, quantized))
  assert len(before) > 2
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_shared_weight_is_quantized_and_counted_once():
  model = qat.quantize(zoo.Shared(nnx.Rngs(0)), (qat.Rule('.*', lsq.LSQ(specs.integer(4, specs.CHANNEL))),))
  frozen = qat.freeze(model)
  assert model.a is model.b and vars(model.a)['kernel'] is vars(model.c)['kernel']
  assert vars(frozen.a)['kernel'] is vars(frozen.c)['kernel']
  assert len(explain.quantized_weights(model)) == 1
  assert len(jax.tree.leaves(nnx.state(model, lambda path, v: path[-1] == 's'))) == 1
  for m in (model, frozen):
    rows = [r for r in qat.explain(m).rows if r.kind == 'Linear']
    assert [bool(r.size_bytes) for r in rows] == [True, False] and rows[1].note == 'the same array as a'


def test_a_kernel_shared_with_an_embedding_sums_along_its_own_axes():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(16, 8, rngs=rngs)
      self.back = nnx.Linear(16, 8, use_bias=False, rngs=rngs)
      self.back.kernel = self.embed.embedding
    def __call__(self, x):
      return self.back(x)

  model = qat.quantize(Model(nnx.Rngs(0)), recipe('channel'))
  x = jax.random.normal(jax.random.key(0), (3, 16))
  x_hat = INPUT(x)
  np.testing.assert_allclose(model(x), x_hat @ model.embed.embedding[...], rtol=1e-5, atol=1e-5)


def test_a_quantized_model_trains_splits_merges_and_copies():
  model = qat.quantize(zoo.Containers(nnx.Rngs(0)), recipe('channel'))
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  x = zoo.example('containers')

  @nnx.jit
  def step(model, optimizer):
    value, g = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 0.5) ** 2))(model)
    optimizer.update(model, g)
    return value

  values = [float(step(model, optimizer)) for _ in range(20)]
  assert values[-1] < 0.8 * values[0]
  y = run({'m': model}, {'m': x})['m']
  graph, state = nnx.split(model)
  for other in (nnx.merge(graph, state), nnx.clone(model), copy.deepcopy(model)):
    np.testing.assert_array_equal(run({'m': other}, {'m': x})['m'], y)
  assert 'QuantizedLinear' in repr(model)


def test_what_plain_containers_hold_is_explained():
  rows = {r.path: r for r in qat.explain(qat.quantize(zoo.PlainContainers(nnx.Rngs(0)), recipe('channel'))).rows}
  assert rows['layers/0'].weight != '-' and rows['layers/1/last'].weight != '-' and rows['gains/0'].weight == '-'
  assert rows['gains/0'].note == 'held by a plain list or dict: rules reach those of nnx.List and nnx.Dict'


@pytest.mark.parametrize('name', ['w8a8', 'w2a2_lsq', 'w4a4_pact', 'mxfp4'])
def test_an_empty_batch_is_an_empty_batch(name):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.conv, self.linear = nnx.Conv(32, 32, 1, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
    def __call__(self, x):
      return self.linear(self.conv(x))

  model = qat.calibrate(qat.quantize(Model(nnx.Rngs(0)), recipes.get(name)), [jnp.ones((2, 4, 32))])
  for m in (model, qat.freeze(model)):
    assert m(jnp.ones((0, 4, 32))).shape == (0, 4, 32)


def test_train_and_eval_reach_the_layers_inside():
  model = qat.quantize(zoo.Oddities(nnx.Rngs(0)), recipe('channel'))
  x = zoo.example('oddities')
  model.train()
  drawn = model(x), model(x)
  assert (np.asarray(drawn[0]) != np.asarray(drawn[1])).any() and model.norm.mean[...].any()
  model.eval()
  np.testing.assert_array_equal(model(x), model(x))
  rows = {r.path: r for r in qat.explain(model).rows}
  assert rows['table'].weight == '-' and rows['gain'].weight == '-' and rows['norm/scale'].weight == '-'


def test_writing_goes_to_the_float_behind():
  model = qat.quantize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), recipe('channel'))
  model.kernel[...] = jnp.full((4, 3), 0.7)
  np.testing.assert_array_equal(vars(model)['kernel'][...], np.float32(0.7))
  model.kernel.set_value(jnp.full((4, 3), 0.3))
  np.testing.assert_array_equal(vars(model)['kernel'][...], np.float32(0.3))


def test_a_layer_of_bfloat16_params_serves_bfloat16():
  layer = nnx.Linear(8, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  model = qat.quantize(layer, (qat.Rule('.*', WEIGHTS['channel']),))
  x = zoo.example('', jnp.bfloat16)
  y, served = (run({'m': m}, {'m': x})['m'] for m in (model, qat.freeze(model)))
  assert y.dtype == served.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(served, np.float32))


def test_random_weights_are_drawn_anew_at_each_call_of_each_stacked_layer():
  model = qat.quantize(zoo.Scanned(nnx.Rngs(0)), recipe('random'))
  x = zoo.example('scanned')
  first, second = (run(nnx.Dict(m=model), {'m': x})['m'] for _ in range(2))
  assert (np.asarray(first) != np.asarray(second)).any()


def test_queries_keys_values_and_probabilities_are_on_their_grids():
  model = qat.quantize(zoo.Attention(nnx.Rngs(0)), (qat.Rule('.*', kind='Attention', scores=INPUT),))
  q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, heads, 2)) for i, heads in enumerate((4, 2, 2)))
  mask = nnx.make_causal_mask(jnp.ones((1, 5)))
  repeat = lambda a: jnp.repeat(a, 2, axis=-2)
  p = jax.nn.softmax(jnp.where(mask, jnp.einsum('bqhd,bkhd->bhqk', INPUT(q), repeat(INPUT(k))) / np.sqrt(2.0), -1e30))
  want = jnp.einsum('bhqk,bkhd->bqhd', INPUT(p), repeat(INPUT(v)))
  np.testing.assert_allclose(model.attention.attention_fn(q, k, v, mask=mask, deterministic=True), want, atol=1e-6)


def test_keys_and_values_of_a_cache_are_on_their_grid_and_the_rest_in_floats():
  model = qat.quantize(zoo.Attention(nnx.Rngs(0)), qat.recipes.get('float_kv4'))
  q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, heads, 8)) for i, heads in enumerate((4, 2, 2)))
  spread = lambda a: jnp.max(a, -1, keepdims=True) - jnp.min(a, -1, keepdims=True)
  attend = model.attention.attention_fn
  zeros = jnp.zeros_like(k)
  shown = attend(q, zeros, v)                                            # The mean of the values as they are held.
  assert 0 < jnp.abs(shown - jnp.repeat(v, 2, -2).mean(1, keepdims=True)).max() < spread(v).max() / 15 / 2
  k_hat, v_hat = (STE(specs.affine(4, specs.TOKEN))(a) for a in (k, v))
  np.testing.assert_allclose(attend(q, k, v), nnx.dot_product_attention(q, k_hat, v_hat), atol=1e-6)
  assert (jnp.abs(k_hat - k) <= spread(k) / 15 * 0.51).all()
  assert 'STE Spec(UINT4' in next(line for line in str(qat.explain(model)).splitlines() if 'attention_fn' in line)


def test_a_list_of_params_learns_its_steps():
  model = qat.quantize(zoo.Containers(nnx.Rngs(0)), (qat.Rule('params/.*', lsq.LSQ(specs.integer(4, specs.CHANNEL))),))
  x = jnp.ones((2, zoo.WIDTH))
  steps = jax.tree.leaves(nnx.state(nnx.grad(lambda m: (m(x)**2).sum())(model), base.StepSize))
  assert len(steps) == 2 and all(jnp.abs(s).max() > 0 for s in steps)
  serve = nnx.jit(lambda m: m(x))
  np.testing.assert_array_equal(serve(model), serve(qat.freeze(model)))


class Tied(nnx.Module):
  """A head that is the embedding, and products that read their weights [out, in], the second a head each."""

  def __init__(self):
    self.embed = nnx.Embed(33, 64, rngs=nnx.Rngs(0))
    self.mix = nnx.Einsum('btd,vd->btv', (64, 64), rngs=nnx.Rngs(1))
    self.heads = nnx.Einsum('hnd,hed->hne', (2, 32, 64), rngs=nnx.Rngs(2))

  def __call__(self, tokens):
    x = self.mix(self.embed(tokens))
    x = self.heads(jnp.concatenate([x, -x]))
    return self.embed.attend(jnp.concatenate(list(x), -1))


ACROSS = [('w4a16', 'low_bit'), ('nf4', 'low_bit'), ('w4a16_g32', 'low_bit'), ('mxfp4', 'low_bit'), ('w8a8', 'float')]


@pytest.mark.parametrize('rows, name, compute', [
    pytest.param(rows, *case, marks=[] if case == ACROSS[0] or rows == 32 else [pytest.mark.slow])
    for rows in (1, 4, 32, 64) for case in ACROSS])
def test_weights_that_are_read_across_are_summed_in_one_order(rows, name, compute):
  model = qat.quantize(Tied(), qat.recipes.get(name), compute=compute)
  serve = nnx.jit(lambda m: m(jnp.arange(rows)[None] % 33))
  np.testing.assert_array_equal(serve(model), serve(qat.freeze(model)))
