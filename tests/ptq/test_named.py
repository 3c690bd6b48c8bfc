"""Every named method: it solves a network, goes on where it was killed, and is no worse than rounding to nearest."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.models import decoder
from qat.ptq import named, walk
from qat.quantizers.static import Static
from qat.quantizers.ste import STE

WEIGHT = STE(specs.integer(2, (8, 1)))
INPUT = Static(specs.integer(4, specs.TENSOR))
# What cuts the learning ones short, and what other methods need.
OPTIONS = dict(adaround=dict(steps=60), brecq=dict(steps=60), qdrop=dict(steps=60, step_rate=1e-3),
               flexround=dict(steps=60), autoround=dict(steps=30), omniquant=dict(steps=60),
               efficientqat=dict(steps=60, rate=1e-3, weight_rate=1e-3), tesseraq=dict(steps=60, rounds=6))
LEARNED = sorted(OPTIONS)


@functools.cache
def network():
  return decoder.llama(nnx.Rngs(0), vocab_size=31, context_length=16, width=16, layers=2, heads=2)


@functools.cache
def texts():
  return [jax.random.randint(jax.random.key(i), (4, 16), 0, 31) for i in range(2)]


def loss(model, tokens):
  """Of the next tokens."""
  log_p = jax.nn.log_softmax(model(tokens)[:, :-1].astype(jnp.float32))
  return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1))


@functools.cache
def quantized(name):
  """The network on the grids that a method is for."""
  inputs = INPUT if name == 'qdrop' else None
  weight = STE(qat.Spec(qat.formats.Int(2, signed=False), (8, 1), zero=qat.Zero())) if name == 'hqq' else WEIGHT
  model = qat.quantize(network(), [qat.Rule(r'blocks/.*', weight, inputs), qat.Rule('.*')])
  return qat.calibrate(model, texts())


def method(name, **options):
  return named.named(name, loss=loss, **OPTIONS.get(name, {}) | options)


class Store:
  """Keeps stages in memory; dies when it is asked to keep stage `dies_at`."""

  def __init__(self, kept=(), dies_at=None):
    self.kept, self.dies_at = dict(kept), dies_at

  def load(self, index):
    return self.kept.get(index)

  def save(self, index, arrays, facts):
    if index == self.dies_at:
      raise KeyboardInterrupt
    self.kept[index] = arrays, facts


def bits(model):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(model))]


@functools.cache
def solved(name):
  """(the frozen network, coverage) of a method."""
  return walk.walk(quantized(name), network(), texts(), method(name))


def block_error(frozen):
  """The mean squared error of what the first block gives."""
  x = network().embed(jnp.concatenate(texts()))
  return float(jnp.mean((frozen.blocks[0](x) - network().blocks[0](x)) ** 2))


# Every method that learns keeps what it solved in one way: one shows it, and the others are slow.
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] if name in set(LEARNED) - {'qdrop'} else []) for name in named.METHODS])
def test_it_goes_on_to_the_same_bytes(name):
  whole, coverage = solved(name)
  assert len(coverage) == 2 * 7 and not any('fallback' in facts for facts in coverage.values())
  store = Store(dies_at=1)
  with pytest.raises(KeyboardInterrupt):
    walk.walk(quantized(name), network(), texts(), method(name), store=store)
  again, _ = walk.walk(quantized(name), network(), texts(), method(name), store=Store(store.kept))
  assert bits(again) == bits(whole)


@pytest.mark.parametrize('name', sorted(set(named.METHODS) - set(LEARNED) - {'hqq', 'awq', 'qronos'}))
def test_solvers_leave_no_larger_error_in_any_layer(name):
  near = walk.walk(quantized(name), network(), texts(), named.named('rtn'))[1]
  for path, facts in solved(name)[1].items():
    if path.startswith('blocks/0'):  # Later ones have other inputs.
      assert facts['error'] <= near[path]['error'] * (1 + 1e-5), path


@pytest.mark.parametrize('name', LEARNED)
def test_those_that_learn_leave_a_smaller_error_in_the_block(name):
  assert block_error(solved(name)[0]) < 0.85 * block_error(qat.freeze(quantized(name)))
  for facts in solved(name)[1].values():
    assert facts['after'] <= facts['before']


def test_hqq_leaves_a_smaller_half_norm():
  kernels = lambda model: [model.blocks[0].attention.q.kernel[...], model.blocks[0].ffn.down.kernel[...]]
  half_norm = lambda model: [float(jnp.sum(jnp.abs(w_hat - w) ** 0.7)) for w_hat, w in zip(kernels(model),
                                                                                          kernels(network()))]
  for mine, nearest in zip(half_norm(solved('hqq')[0]), half_norm(qat.freeze(quantized('hqq')))):
    assert mine < 0.99 * nearest
