"""Transforms by name: those before leave the function, those after leave a smaller error; wrong ones are refused."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest

import qat
from qat.core import qarray
from qat.core import specs
from qat.ptq import incoherence
from qat.ptq import links
from qat.quantizers.ste import STE
from qat.run import tasks
from qat.run import transforms
from tests.ptq import tiny

RECIPE = (qat.Rule(r'blocks/.*', STE(specs.integer(3, (8, 1))), STE(specs.integer(4, specs.TOKEN))), qat.Rule('.*'))
WEIGHTS = (qat.Rule(r'blocks/.*', STE(specs.integer(2, (8, 1)))), qat.Rule('.*'))
OPTIONS = dict(spin=dict(steps=12, rate=1.0), let=dict(epochs=5, rate=2e-2))


@functools.cache
def task():
  model = tiny.llama()
  batches = [(jax.random.randint(jax.random.key(i), (2, 8), 0, 40),) for i in range(2)]
  return tasks.Task(model, batches, None, {}, (links.GATED, links.heads(8)), tasks.next_token)


def logits(model):
  run = nnx.jit(lambda model, batch: tasks.call(model, batch))
  model = nnx.clone(model)
  model.eval()
  return np.stack([run(model, batch) for batch in task().batches])


@functools.cache
def transformed(name):
  return transforms.before(task(), [dict(name=name, **OPTIONS.get(name, {}))], RECIPE)


def error(model):
  """What the recipe does to the outputs of a float network."""
  return np.mean((logits(qat.quantize(model, RECIPE)) - logits(task().model)) ** 2)


@pytest.mark.parametrize('name', transforms.BEFORE)
def test_the_function_stays(name):
  before, after = logits(task().model), logits(transformed(name))
  assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()
  changed = [not np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(nnx.state(m.blocks[0], nnx.Param))
                                                        for m in (task().model, transformed(name))))]
  assert any(changed)


@pytest.mark.parametrize('name', ['spin', 'let', 'rotate'])
def test_the_quantized_network_comes_nearer(name):
  assert error(transformed(name)) < 0.99 * error(task().model)


def test_learned_rotations_have_a_smaller_loss_than_random_ones():
  loss = nnx.jit(lambda model, batch: tasks.next_token(model, batch))
  mean = lambda name: np.mean([loss(qat.quantize(transformed(name), RECIPE), batch) for batch in task().batches])
  assert mean('spin') < mean('rotate')


def test_incoherent_layers_have_no_outliers_and_are_quantized_where_they_are_rotated():
  spiked = nnx.clone(task().model)
  kernel = spiked.blocks[0].ffn.up.kernel
  kernel.set_value(kernel.get_value().at[3, 5].set(5.0))
  found = transforms.before(dataclasses.replace(task(), model=spiked), [dict(name='incoherence')], RECIPE)
  assert incoherence.incoherence(found.blocks[0].ffn.up.kernel[...]) < 0.3 * incoherence.incoherence(kernel[...])
  spec = specs.integer(4, specs.TENSOR)
  rounding = lambda w: np.linalg.norm(qarray.decode(qarray.encode(w, spec)) - w)
  assert rounding(found.blocks[0].ffn.up.kernel[...]) < 0.5 * rounding(kernel[...])
  frozen = qat.freeze(qat.quantize(transformed('incoherence'), WEIGHTS))
  np.testing.assert_array_equal(logits(frozen), logits(qat.quantize(transformed('incoherence'), WEIGHTS)))


@pytest.mark.parametrize('name', transforms.AFTER)
def test_those_after_bring_the_outputs_nearer_and_keep_the_codes(name):
  frozen = qat.freeze(qat.quantize(task().model, WEIGHTS))
  options = dict(steps=20, rate=1e-2) if name == 'scales' else {}
  found = transforms.after(frozen, task().model, task(), [dict(name=name, **options)])
  distance = lambda model: np.mean((logits(model) - logits(task().model)) ** 2)
  assert distance(found) < distance(frozen)
  for mine, theirs in zip(found.blocks, frozen.blocks):
    read = lambda block: vars(block.ffn.up)['kernel'].get_value().codes
    np.testing.assert_array_equal(read(mine), read(theirs))
  again = transforms.after(frozen, task().model, task(), [dict(name=name, **options)])
  np.testing.assert_array_equal(logits(found), logits(again))


@pytest.mark.parametrize('wanted, words', [
    (dict(name='rotat'), "transform 'rotat': there is none of that name. Did you mean 'rotate'?"),
    (dict(name='scales', step=3), r"transform 'scales': \['step'\] mean nothing to it. It takes \['steps'"),
    (dict(name='scales', distance='k'), "distance 'k' is none. Did you mean 'kl'?")])
def test_wrong_ones_are_refused(wanted, words):
  with pytest.raises(ValueError, match=words):
    transforms.before(task(), [wanted], WEIGHTS)
    transforms.after(task().model, task().model, task(), [wanted])


def test_biases_behind_rotated_outputs_are_refused():
  frozen = qat.freeze(qat.quantize(transformed('incoherence'), WEIGHTS))
  with pytest.raises(ValueError, match='turned after the bias'):
    transforms.after(frozen, task().model, task(), [dict(name='bias_correction')])
