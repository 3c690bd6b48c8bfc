"""Adapters: what layers compute and learn with them, on floats and on codes, against numpy."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qat
from qat.core import codebooks, ranges, specs
from qat.models import decoder
from qat.nn import adapters, lora, merge, weights
from qat.quantizers.ste import STE
from tests.nn import zoo
from tests.nn.test_layers import CASES, EMPTY, example

INT4 = (qat.Rule('.*', weight=STE(specs.integer(4, specs.CHANNEL))),)
NF4_DQ = (qat.Rule('.*', weight=STE(specs.kernel(specs.NF4_DQ), ranges.centered)),)
ADAPTERS = nnx.DiffState(0, lora.LoRAParam)


def randomized(model, seed=0):
  """`model`, with other numbers in its adapters, in place."""
  rng = np.random.default_rng(seed)
  for path, p in nnx.to_flat_state(nnx.state(model, lora.LoRAParam)):
    noise = rng.standard_normal(p.shape).astype(np.float32)
    p[...] = jnp.asarray(p[...] * (1 + 0.2 * noise) if path[-1] == 'magnitude' else 0.3 * noise)
  return model


def adapter(layer, name='default'):
  held, = lora.adapters(layer).values()
  return held[name]


def numbers(x):
  return np.asarray(x, np.float64)


@nnx.jit
def run(models, xs):
  return {key: model(xs[key]) for key, model in models.items()}


@nnx.jit
def learn(models, xs):
  loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
  return {key: nnx.grad(loss, argnums=ADAPTERS)(model, xs[key]) for key, model in models.items()}


def nf4_dq(q):
  """What a QArray of NF4_DQ stands for, in numpy: f64[in, out]."""
  outer, offset = (np.asarray(a, np.float32) for a in (q.scale.scale, q.scale.zero))
  scale = np.asarray(codebooks.DYNAMIC8.levels(), np.float32)[np.asarray(q.scale.codes)]
  scale = (scale * np.repeat(outer, 256)[:len(scale)] + offset).astype(np.float32)
  flat = np.asarray(codebooks.NF4.levels(), np.float32)[np.asarray(q.codes).T.ravel()]   # runs along [out, in]
  return numbers((flat * np.repeat(scale, 64)[:flat.size]).reshape(q.shape[::-1]).T)


# The batch axes of a kernel, by case; its outputs are what neither these nor the inputs are.
BATCH = {'linear general of a batch axis': (0,), 'einsum with a batch letter': (0,)}


def update(case, shape, batch, A, B):
  """A B in the axes of a kernel: float[*shape]."""
  outputs = tuple(a for a in range(len(shape)) if a not in case.inputs + batch)
  order = batch + case.inputs + outputs
  return np.transpose((A @ B).reshape([shape[a] for a in order]), np.argsort(order))


@functools.cache
def layers():
  """For each layer of test_layers: it with an adapter, and it with W + s A B in place of W, computed in numpy."""
  adapted, wanted, xs = {}, {}, {}
  for name, case in CASES.items():
    layer = case.make(rngs=nnx.Rngs(0))
    model = randomized(lora.lora(layer, [''], 2, 3.0))
    one, kernel = adapter(model), vars(layer)[case.name]
    delta = update(case, kernel.shape, BATCH.get(name, ()), numbers(one.A[...]), numbers(one.B[...]))
    kernel[...] = kernel[...] + jnp.asarray(1.5 * delta, jnp.float32)
    adapted[name], wanted[name], xs[name] = model, layer, example(case, jnp.float32)
  return run(nnx.Dict(adapted), xs), run(nnx.Dict(wanted), xs)


@pytest.mark.parametrize('name', CASES)
def test_a_layer_computes_w_plus_s_a_b(name):
  got, want = layers()
  assert got[name].shape == want[name].shape and (want[name].any() or name == EMPTY)
  np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=2e-5)


KINDS = dict(floats=dict(), frozen=dict(), dora=dict(dora=True))


@functools.cache
def models():
  """Every model of the zoo with adapters of each kind, and float models that have the merged weights."""
  adapted, start, merged, xs = {}, {}, {}, {}
  for name, make in zoo.MODELS.items():
    floats = make(nnx.Rngs(0))
    floats.eval()
    frozen = qat.freeze(qat.quantize(floats, INT4))
    for kind, options in KINDS.items():
      key, base = f'{name}, {kind}', floats if kind == 'floats' else frozen
      model = lora.lora(base, ['.*'], 2, 3.0, **options)
      start[key] = base, nnx.clone(model)
      adapted[key] = randomized(model)
      merged[key], xs[key] = merge.merge(model), zoo.example(name)
  bases, starts = (nnx.Dict({k: v[i] for k, v in start.items()}) for i in range(2))
  return adapted, merged, xs, [run(m, xs) for m in (bases, starts, nnx.Dict(adapted), nnx.Dict(merged))]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', zoo.MODELS)
def test_a_model_starts_as_its_base_and_computes_its_merged_weights(name, kind):
  key = f'{name}, {kind}'
  *_, outputs = models()
  base, start, got, want = (np.asarray(ys[key]) for ys in outputs)
  np.testing.assert_allclose(start, base, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
  assert np.abs(got - base).max() > 1e-3


@functools.cache
def gradients():
  """Gradients of adapters on codes, and on floats that are these codes' numbers."""
  frozen = {key: model for key, model in models()[0].items() if key.endswith('frozen')}
  floats = {}
  for key, model in frozen.items():
    plain = lora.lora(merge.merge(start(model)), ['.*'], 2, 3.0)
    nnx.update(plain, nnx.state(model, lora.LoRAParam))
    floats[key] = plain
  xs = {key: models()[2][key] for key in frozen}
  return learn(nnx.Dict(frozen), xs), learn(nnx.Dict(floats), xs)


def start(model):
  """`model`, with B = 0."""
  model = nnx.clone(model)
  for held in lora.adapters(model).values():
    held['default'].B[...] = jnp.zeros_like(held['default'].B[...])
  return model


@pytest.mark.parametrize('name', zoo.MODELS)
def test_gradients_on_codes_are_those_on_their_numbers(name):
  got, want = (dict(nnx.to_flat_state(g[f'{name}, frozen'])) for g in gradients())
  assert got.keys() == want.keys() and got
  for path in got:
    assert np.abs(want[path][...]).max() > 0
    np.testing.assert_allclose(got[path][...], want[path][...], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope='module')
def qlora():
  """A Linear on NF4 with double quantization, its adapter, numbers, and the gradients of sum(y^2) / 2."""
  rng = np.random.default_rng(0)
  layer = nnx.Linear(96, 80, rngs=nnx.Rngs(0))
  layer.bias[...] = jnp.asarray(rng.standard_normal(80), jnp.float32)
  model = randomized(lora.lora(qat.freeze(qat.quantize(layer, NF4_DQ)), ['.*'], 4, 6.0))
  x = rng.standard_normal((5, 96)).astype(np.float32)
  loss = lambda model, x: jnp.sum(model(x) ** 2) / 2
  grads = lambda of: nnx.grad(loss, argnums=of)
  return model, x, *nnx.jit(lambda model, x: (model(x), grads(ADAPTERS)(model, x), grads(1)(model, x)))(model, x)


def test_qlora_is_equation_5(qlora):
  """y = x doubleDequant(W) + s x A B + b (QLoRA, Eq. (5)), and the gradients of A, B and x that follow from it."""
  model, x, y, grads, dx = qlora
  W, one = nf4_dq(vars(model)['kernel'].get_value()), adapter(model)
  A, B, b, s = numbers(one.A[...]), numbers(one.B[...]), numbers(model.bias[...]), 6 / 4
  want = x @ W + s * (x @ A) @ B + b
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  got = {path[-1]: p[...] for path, p in nnx.to_flat_state(grads)}
  assert sorted(got) == ['A', 'B']
  np.testing.assert_allclose(got['A'], s * x.T @ want @ B.T, rtol=2e-5, atol=1e-3)
  np.testing.assert_allclose(got['B'], s * (x @ A).T @ want, rtol=2e-5, atol=1e-3)
  np.testing.assert_allclose(dx, want @ (W + s * A @ B).T, rtol=2e-5, atol=1e-3)


def test_a_step_of_adam_changes_adapters_and_no_other_byte():
  model = decoder.llama(nnx.Rngs(0), vocab_size=31, context_length=16, width=16, layers=2, heads=2)
  model = lora.lora(qat.freeze(qat.quantize(model, NF4_DQ)), [lora.LoRA('.*', 2, 2.0, dropout=0.5, kind='Linear')])
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.LoRAParam)
  tokens = jnp.arange(24).reshape(2, 12)
  own = lambda: {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, lora.LoRAParam))}
  others = nnx.Not(nnx.Any(nnx.RngState, lora.LoRAParam))
  rest = lambda: [np.asarray(v).tobytes() for v in jax.tree.leaves(nnx.state(model, others))]
  before, kept = own(), rest()

  @nnx.jit
  def step(model, optimizer, tokens):
    loss = lambda model: jnp.mean(jnp.square(model(tokens)))
    optimizer.update(model, nnx.grad(loss, argnums=ADAPTERS)(model))

  for _ in range(2):                                                       # A moves once B is not 0.
    step(model, optimizer, tokens)
  assert rest() == kept and len(kept) > 14
  assert all((own()[path] != value).any() for path, value in before.items()) and len(before) == 28
  slots = [path for path, _ in nnx.to_flat_state(nnx.state(optimizer)) if 'mu' in path]
  assert len(slots) == 28 and {path[-1] for path in slots} == {'A', 'B'}


def test_dora_is_the_papers_in_numpy():
  """Eq. (5) with the norm a constant for the gradient (Eq. (11))."""
  rng = np.random.default_rng(1)
  layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
  model = randomized(lora.lora(layer, ['.*'], 2, 4.0, dora=True))
  x = rng.standard_normal((3, 6)).astype(np.float32)
  loss = lambda model, x: jnp.sum(model(x) ** 2) / 2
  y, grads = nnx.jit(lambda model, x: (model(x), nnx.grad(loss, argnums=ADAPTERS)(model, x)))(model, x)
  one = adapter(model)
  W, A, B, m = (numbers(p[...]) for p in (layer.kernel, one.A, one.B, one.magnitude))
  V = W + 2 * A @ B
  length = np.sqrt((V * V).sum(0))
  want = x @ (V * (m / length))
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  got = {path[-1]: p[...] for path, p in nnx.to_flat_state(grads)}
  dV = x.T @ want * (m / length)
  for name, g in dict(A=2 * dV @ B.T, B=2 * A.T @ dV, magnitude=((x @ V / length) * want).sum(0)).items():
    np.testing.assert_allclose(got[name], g, rtol=1e-4, atol=1e-4)


def test_magnitudes_start_at_the_weights_lengths():
  layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
  layer.kernel[...] = layer.kernel[...].at[:, 1].set(0.0)
  model = lora.lora(layer, ['.*'], 2, 4.0, dora=True)
  np.testing.assert_allclose(adapter(model).magnitude[...], np.linalg.norm(layer.kernel[...], axis=0), rtol=1e-6)
  assert np.isfinite(model(jnp.ones((2, 6)))).all()


def test_scalings():
  s = lambda **options: adapter(lora.lora(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), ['.*'], 4, 6.0, **options)).scaling
  assert s() == 1.5 and s(scaling=adapters.by_root_of_rank) == 3.0


def test_group_pools_the_input():
  rng = np.random.default_rng(2)
  layer = nnx.Linear(8, 5, use_bias=False, rngs=nnx.Rngs(0))
  model = randomized(lora.lora(layer, ['.*'], 2, 4.0, group=4))
  one, x = adapter(model), rng.standard_normal((3, 8)).astype(np.float32)
  assert one.A.shape == (2, 2)
  pooled = numbers(x).reshape(3, 2, 4).sum(2)
  np.testing.assert_allclose(model(x), x @ numbers(layer.kernel[...]) + 2 * pooled @ numbers(one.A[...]) @ numbers(
      one.B[...]), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(merge.merge(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_dropout_drops_the_input_of_a_and_of_no_other():
  layer = nnx.Linear(512, 3, use_bias=False, rngs=nnx.Rngs(0))
  model = randomized(lora.lora(layer, ['.*'], 1, 1.0, dropout=0.25, rngs=nnx.Rngs(3)))
  one, x = adapter(model), jnp.ones((1, 512))
  one.A[...] = jnp.ones_like(one.A[...])
  base, B = numbers(x @ layer.kernel[...]), numbers(one.B[...])
  share = [((numbers(model(x)) - base) / B).mean() / 512 for _ in range(2)]
  assert share[0] != share[1] and all(abs(s - 1) < 0.1 for s in share)   # 3 sigma of 512 draws are 0.077
  model.eval()
  np.testing.assert_allclose(model(x), base + 512 * B, rtol=1e-5)


def test_layers_of_a_stack_drop_different_inputs():
  model = lora.lora(zoo.Ensemble(nnx.Rngs(0)), ['.*'], 1, 1.0, dropout=0.5)
  held = adapter(model)
  held.A[...], held.B[...] = jnp.ones_like(held.A[...]), jnp.ones_like(held.B[...])
  x = jnp.asarray(2.0 ** np.arange(8))[None]                               # Its sums tell which numbers were dropped.
  vary = nnx.jit(lambda model, x: model(x))
  base = vary(lora.activate(model), x)
  drawn = np.asarray(vary(model, x) - base)[:, 0, 0]
  assert len(np.unique(np.round(drawn))) == 3
  assert not np.array_equal(np.round(drawn), np.round(np.asarray(vary(model, x) - base)[:, 0, 0]))


def test_several_adapters():
  layer = qat.freeze(qat.quantize(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), INT4))
  x = jax.random.normal(jax.random.key(0), (2, 8))
  model = randomized(lora.lora(lora.lora(layer, ['.*'], 2, 2.0, name='one'), ['.*'], 3, 6.0, name='two'))
  assert lora.names(model) == ['one', 'two'] and adapter(model, 'two').rank == 3
  part = lambda *names: np.asarray(lora.activate(model, *names)(x))
  base = part()
  np.testing.assert_array_equal(base, layer(x))
  np.testing.assert_allclose(model(x), part('one') + part('two') - base, rtol=1e-5, atol=1e-6)
  assert adapter(model, 'one').active                                      # The model that was given stays.
  left = lora.remove(model, 'one')
  assert lora.names(left) == ['two'] and lora.names(model) == ['one', 'two']
  np.testing.assert_array_equal(left(x), part('two'))
  np.testing.assert_array_equal(lora.remove(model, 'one', 'two')(x), layer(x))


def test_first_match_wins_and_a_rule_of_qat_gives_none():
  model = decoder.gpt(nnx.Rngs(0), vocab_size=31, context_length=16, width=16, layers=2, heads=2)
  model = lora.lora(model, [qat.Rule('blocks/0/.*'), lora.LoRA('.*/[qv]', 3, 1.0), '.*'], 2, 1.0)
  ranks = {path: held['default'].rank for path, held in lora.adapters(model).items()}
  assert ranks['blocks/1/attention/q'] == 3 and ranks['blocks/1/attention/k'] == 2 and ranks['embed'] == 2
  assert not any(path.startswith('blocks/0') for path in ranks)


def test_freeze_keeps_adapters():
  model = randomized(lora.lora(qat.quantize(zoo.Shared(nnx.Rngs(0)), INT4), ['.*'], 2, 2.0))
  x, frozen = zoo.example('shared'), qat.freeze(model)
  assert isinstance(vars(frozen.a)['kernel'], weights.Codes) and vars(frozen.c)['kernel'] is vars(frozen.a)['kernel']
  np.testing.assert_allclose(frozen(x), model(x), rtol=1e-6, atol=1e-6)


RECIPES = {'dynamic': qat.recipes.get('w4a8'), 'static': qat.recipes.get('w4a8_static'),
           'attention': qat.recipes.get('w4a8_attention')}


@pytest.mark.parametrize('name', ['ensemble', 'scanned', 'attention', 'tied', 'remat'])
def test_adapters_stand_beside_integer_products(name):
  """Frozen layers whose inputs are quantized: their own product, bit for bit, and s x A B of the floats beside it."""
  recipe = RECIPES['attention' if name == 'attention' else 'static' if name in ('ensemble', 'scanned') else 'dynamic']
  floats, x = zoo.MODELS[name](nnx.Rngs(0)), zoo.example(name)
  frozen = qat.freeze(qat.calibrate(qat.quantize(floats, recipe), [x]))
  model = lora.lora(frozen, ['.*'], 2, 2.0)
  outputs = run(nnx.Dict(base=frozen, model=model), dict(base=x, model=x))
  np.testing.assert_array_equal(outputs['model'], outputs['base'])
  grads = nnx.to_flat_state(learn(nnx.Dict(model=randomized(model)), dict(model=x))['model'])
  assert len(grads) and all(np.isfinite(g[...]).all() and np.abs(g[...]).max() > 0 for _, g in grads)


def test_explain_lists_adapters():
  rows = {r.path: r for r in qat.explain(lora.lora(zoo.Tied(nnx.Rngs(0)), ['.*'], 2, 2.0)).rows}
  assert rows['embed/adapters/embedding/default/A'].size_bytes == 4 * 8 * 2


def test_labels_give_b_a_rate_of_its_own():
  model = randomized(lora.lora(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), ['.*'], 2, 2.0, dora=True))
  tx = optax.multi_transform({'A': optax.sgd(1.0), 'B': optax.sgd(16.0), 'magnitude': optax.sgd(0.5)}, lora.labels)
  optimizer, before = nnx.Optimizer(model, tx, wrt=lora.LoRAParam), nnx.clone(adapter(model))
  grads = jax.tree.map(jnp.ones_like, nnx.state(model, lora.LoRAParam))
  optimizer.update(model, grads)
  for name, rate in dict(A=1.0, B=16.0, magnitude=0.5).items():
    moved = getattr(before, name)[...] - getattr(adapter(model), name)[...]
    np.testing.assert_allclose(moved, rate, rtol=1e-4)
  with pytest.raises(ValueError, match='no array of an adapter'):
    lora.labels({'kernel': jnp.ones(2)})


def linear():
  return nnx.Linear(8, 6, rngs=nnx.Rngs(0))


def adapted():
  return lora.lora(linear(), [''], 2, 1.0)


@pytest.mark.parametrize('make, rules, options, message', [
    (linear, [''], dict(rank=7, alpha=1.0), r"Layer '': it has 8 inputs and 6 outputs.*rank 7.*at most rank 6"),
    (linear, [''], dict(rank=3, alpha=1.0, group=4), 'it has 2 inputs after pooling and 6 outputs'),
    (linear, [''], dict(rank=1, alpha=1.0, group=3), 'groups of 3 do not tile'),
    (linear, [''], dict(rank=0, alpha=1.0), 'rank is 0. Give a whole number'),
    (linear, [''], dict(rank=2, alpha=0.0), 'alpha is 0.0. Give a number above 0'),
    (linear, [''], dict(rank=2, alpha=float('nan')), 'alpha is nan'),
    (linear, [''], dict(rank=2), 'alpha is None'),
    (linear, [''], dict(rank=2, alpha=1.0, dropout=1.0), 'dropout is 1.0'),
    (linear, ['hed'], dict(rank=2, alpha=1.0), r"No layer matches the rules \['hed'\]"),
    (linear, [], dict(rank=2, alpha=1.0), 'There are no rules'),
    (linear, [qat.Rule('')], {}, 'give no layer an adapter'),
    (linear, ['('], dict(rank=2, alpha=1.0), 'no regular expression'),
    (linear, [''], dict(rank=2, alpha=1.0, name='a/b'), "named 'a/b'"),
    (adapted, [''], dict(rank=2, alpha=1.0), "has an adapter 'default' already"),
    (adapted, ['adapters/.*'], dict(rank=2, alpha=1.0, name='b'), 'which is an adapter'),
    (adapted, [''], dict(rank=2, alpha=1.0, name='b', dora=True), 'with magnitudes'),
    (lambda: nnx.Conv(4, 4, 3, rngs=nnx.Rngs(0)), [''], dict(rank=2, alpha=1.0, dropout=0.1), 'nothing for a dropout'),
])
def test_errors_say_what_is_wrong(make, rules, options, message):
  with pytest.raises(ValueError, match=message):
    lora.lora(make(), rules, **options)


def test_what_is_no_rule_is_a_type_error():
  with pytest.raises(TypeError, match=r"write a list, such as \['blocks"):
    lora.lora(linear(), '.*', 2, 1.0)
  with pytest.raises(TypeError, match='has quantizers'):
    lora.lora(linear(), INT4)
  with pytest.raises(TypeError, match='The rule 3 is a int'):
    lora.lora(linear(), [3])


def test_unknown_names_and_late_quantizers_are_errors():
  model = lora.lora(linear(), [''], 2, 1.0)
  for change in (lora.activate, lora.remove):
    with pytest.raises(ValueError, match=r"no adapter \['other'\]. It has \['default'\]"):
      change(model, 'other')
  with pytest.raises(ValueError, match='has adapters on its float weight'):
    qat.quantize(model, INT4)
