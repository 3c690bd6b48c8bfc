"""The walk: what each stage sees, that it goes on where it was killed, and what comes out."""

import dataclasses
import gc
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.models import cnn, decoder
from qat.nn import quantized as quantized_layers, weights
from qat.ptq import methods, named, solvers, walk
from qat.quantizers.ste import STE

RECIPE = [qat.Rule(r'blocks/.*', weight=STE(specs.integer(3, (8, 1)))), qat.Rule('.*')]
NEAREST, GPTQ = methods.Layerwise(solvers.Nearest()), named.named('gptq', rule='absmax')


def network(layers=3):
  return decoder.llama(nnx.Rngs(0), vocab_size=31, context_length=16, width=16, layers=layers, heads=2)


def texts(count=2):
  return [jax.random.randint(jax.random.key(i), (4, 16), 0, 31) for i in range(count)]


def bits(model):
  """Every array of a model, as bytes."""
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(model))]


class Store:
  """Keeps stages in memory; dies when it is asked to keep stage `dies_at`."""

  def __init__(self, kept=(), dies_at=None):
    self.kept, self.dies_at, self.loaded = dict(kept), dies_at, []

  def load(self, index):
    self.loaded += [index] * (index in self.kept)
    return self.kept.get(index)

  def save(self, index, arrays, facts):
    if index == self.dies_at:
      raise KeyboardInterrupt
    self.kept[index] = arrays, facts


def test_round_to_nearest_is_freeze():
  model = network()
  quantized = qat.quantize(model, RECIPE)
  frozen, coverage = walk.walk(quantized, model, texts(), NEAREST)
  assert bits(frozen) == bits(qat.freeze(quantized))
  assert len(coverage) == 3 * 7 and all(facts['rows'] == 2 * 4 * 16 for facts in coverage.values())


def test_gptq_lowers_the_error_of_the_logits_and_leaves_the_model_as_it_was():
  model = network()
  quantized = qat.quantize(model, RECIPE)
  before = bits(quantized)
  run = nnx.jit(lambda model, x: model(x))
  error = lambda frozen: sum(float(jnp.mean((run(frozen, x) - run(model, x)) ** 2)) for x in texts())
  frozen, coverage = walk.walk(quantized, model, texts(), GPTQ)
  assert error(frozen) < 0.8 * error(qat.freeze(quantized))
  assert bits(quantized) == before
  assert all(isinstance(b.attention.q.__dict__['kernel'], weights.Codes) for b in frozen.blocks)
  assert not any('fallback' in facts for facts in coverage.values())


@pytest.mark.parametrize('dies_at', [0, 2])
def test_a_walk_that_was_killed_goes_on_to_the_same_bytes(dies_at):
  model = network()
  quantized = qat.quantize(model, RECIPE)
  whole, coverage = walk.walk(quantized, model, texts(), GPTQ)
  store = Store(dies_at=dies_at)
  with pytest.raises(KeyboardInterrupt):
    walk.walk(quantized, model, texts(), GPTQ, store=store)
  again = Store(store.kept)
  resumed, facts = walk.walk(quantized, model, texts(), GPTQ, store=again)
  assert again.loaded == list(range(dies_at))
  assert bits(resumed) == bits(whole)
  without_time = lambda cover: {path: {k: v for k, v in f.items() if k != 'seconds'} for path, f in cover.items()}
  assert without_time(facts) == without_time(coverage)


def test_what_another_recipe_left_is_refused():
  model = network()
  store = Store()
  walk.walk(qat.quantize(model, RECIPE), model, texts(), NEAREST, store=store)
  affine = [qat.Rule(r'blocks/.*', weight=STE(specs.affine(3, (8, 1)))), qat.Rule('.*')]
  with pytest.raises(ValueError, match='of another model or recipe'):
    walk.walk(qat.quantize(model, affine), model, texts(), NEAREST, store=store)


def test_blocks_see_what_the_quantized_blocks_before_them_return():
  model = network()
  seen = {}

  class Spy(methods.Layerwise):
    def __call__(self, work):
      seen[work.index] = work.inputs[0].arrays[0]
      return super().__call__(work)

  frozen, _ = walk.walk(qat.quantize(model, RECIPE), model, texts(), Spy(solvers.Nearest()))
  x = frozen.embed(texts()[0])
  for i, block in enumerate(frozen.blocks):
    np.testing.assert_allclose(seen[i], x, rtol=1e-5, atol=1e-5)
    x = block(x)


def test_a_network_with_batch_norm_keeps_its_statistics_and_its_mode():
  model = cnn.CNN((4, 8), nnx.Rngs(0), image_shape=(8, 8, 1))
  model.train()
  quantized = qat.quantize(model, qat.recipes.get('w4a16'))
  x = [jax.random.normal(jax.random.key(0), (16, 8, 8, 1))]
  frozen, coverage = walk.walk(quantized, model, x, named.named('gptq', rule='absmax'))
  assert not frozen.blocks[0].norm.use_running_average
  for mine, other in zip(*(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (model, frozen))):
    np.testing.assert_array_equal(mine, other)
  assert set(coverage) == {'blocks/0/conv', 'blocks/1/conv', 'head'}


def test_no_batch_is_refused():
  model = network()
  with pytest.raises(ValueError, match='no batch'):
    walk.walk(qat.quantize(model, RECIPE), model, [], NEAREST)


def test_sequential_layers_see_the_codes_of_the_waves_before_them():
  model = network(2)
  quantized = qat.quantize(model, RECIPE)
  seen = []

  class Spy(methods.Layerwise):
    def gather(self, work, layers):
      seen.append((layers, {path: isinstance(vars(m).get('kernel'), weights.Codes)
                            for path, m in quantized_layers.layers(work.block).items()}))
      return super().gather(work, layers)

  frozen, _ = walk.walk(quantized, model, texts(), Spy(GPTQ.solver, True))
  done = set()
  for layers, is_coded in seen[:4]:
    assert {path for path, coded in is_coded.items() if coded} == done
    done |= set(layers)
  assert len(seen) == 2 * 4 and len(done) == 7
  # `down` is solved for what the coded layers before it give.
  x = jnp.concatenate([frozen.embed(batch) for batch in texts()])
  block = frozen.blocks[0]
  x = x + block.attention(block.attention_norm(x))
  y = block.ffn_norm(x)
  y = np.asarray(nnx.silu(block.ffn.gate(y)) * block.ffn.up(y), np.float64).reshape(-1, block.ffn.down.in_features)
  H = jnp.float32(y.T @ y / len(y))
  q, _ = GPTQ.solver(model.blocks[0].ffn.down.kernel.get_value(), types.SimpleNamespace(H=H), RECIPE[0].weight.spec)
  mine = vars(block.ffn.down)['kernel'].get_value()
  assert np.mean(np.asarray(q.codes) == np.asarray(mine.codes)) > 0.98    # But for ties, in sums of another order.


def test_layers_of_a_block_see_its_float_weights_and_its_quantized_inputs():
  model = network(2)
  rule = dataclasses.replace(RECIPE[0], input=STE(specs.integer(4, specs.TOKEN)))
  seen = {}

  class Spy(methods.Layerwise):
    def gather(self, work, layers):
      seen[work.index] = super().gather(work, layers)
      return seen[work.index]

  walk.walk(qat.quantize(model, [rule, qat.Rule('.*')]), model, texts(), Spy(solvers.Nearest()))
  inputs_only = qat.quantize(model, [dataclasses.replace(rule, weight=None), qat.Rule('.*')])
  x = jnp.concatenate([model.embed(batch) for batch in texts()])
  block, first = inputs_only.blocks[0], min(seen)
  x = x + block.attention(block.attention_norm(x))
  y = block.ffn_norm(x)
  y = rule.input(nnx.silu(block.ffn.gate(y)) * block.ffn.up(y))
  y = np.asarray(y, np.float64).reshape(-1, block.ffn.down.in_features)
  np.testing.assert_allclose(seen[first]['ffn/down'].H, y.T @ y / len(y), rtol=1e-3, atol=1e-4)


def live_bytes():
  """Of all arrays on the device that somebody holds."""
  gc.collect()
  return sum(x.nbytes for x in jax.live_arrays())


def test_it_holds_one_model_and_what_one_block_is_called_with():
  model = decoder.llama(nnx.Rngs(0), vocab_size=31, context_length=16, width=32, layers=8, heads=2)
  batches = [jax.random.randint(jax.random.key(i), (8, 16), 0, 31) for i in range(8)]
  quantized = qat.quantize(model, [dataclasses.replace(RECIPE[0], weight=STE(specs.integer(4, (32, 1))))])
  blocks = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.blocks)))
  inputs = 8 * 8 * 16 * 32 * 4                                            # Numbers of 4 bytes.
  before, held = live_bytes(), []

  class Spy(methods.Layerwise):
    def gather(self, work, layers):
      moments = super().gather(work, layers)
      held.append(live_bytes() - before - sum(x.nbytes for x in jax.tree.leaves(moments)))
      return moments

  watch = lambda done: held.append(live_bytes() - before)
  frozen, _ = walk.walk(quantized, model, batches, Spy(solvers.Nearest()), watch=watch)
  coded = sum(x.nbytes for x in jax.tree.leaves(nnx.state(frozen, weights.Codes)))
  assert 0.2 * blocks < coded < 0.4 * blocks                              # A byte a code, and the scales.
  assert coded < held[-1] and max(held) < coded + 1.5 * inputs
  assert blocks > 2 * inputs                                              # What a copy of the model would add.
