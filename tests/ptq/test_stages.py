"""Stages: chains are found where blocks hand their results on, and nowhere else."""

from flax import nnx
import jax.numpy as jnp
import pytest

import qat
from qat.models import cnn, decoder, mlp
from qat.ptq import stages

RECIPE = [qat.Rule('.*', weight=qat.recipes.get('w4a16')[0].weight)]
call = lambda model, batch: model(batch)


def plan(model, batch, apply=call, recipe=RECIPE):
  return stages.stages(qat.quantize(model, recipe), apply, batch)


def test_blocks_of_a_decoder_are_a_chain_between_its_embedding_and_its_head():
  model = decoder.llama(nnx.Rngs(0), vocab_size=11, context_length=8, width=16, layers=2, heads=2, tied_head=False)
  first, *blocks, last = plan(model, jnp.zeros((1, 8), jnp.int32))
  assert (first, last) == (stages.Stage('', ('embed',)), stages.Stage('', ('head',)))
  assert [b.block for b in blocks] == ['blocks/0', 'blocks/1']
  assert blocks[1].layers == tuple(
      f'blocks/1/{name}' for name in ('attention/q', 'attention/k', 'attention/v', 'attention/o',
                                      'ffn/gate', 'ffn/up', 'ffn/down'))


def test_layers_between_which_something_happens_are_no_chain():
  assert plan(mlp.MLP((4, 4, 4), nnx.Rngs(0)), jnp.zeros((1, 4))) == [
      stages.Stage('', ('layers/0',)), stages.Stage('', ('layers/1',))]


def test_blocks_of_several_classes_are_a_chain():
  model = cnn.CNN((2, 4, 4), nnx.Rngs(0), image_shape=(8, 8, 1), block=cnn.SeparableBlock)
  *blocks, head = plan(model, jnp.zeros((1, 8, 8, 1)))
  assert [b.block for b in blocks] == ['blocks/0', 'blocks/1', 'blocks/2']
  assert head == stages.Stage('', ('head',))


class Masked(nnx.Module):
  """Blocks that share a mask; `scale` differs from call to call if it is told to."""

  def __init__(self, rngs, scales=(1, 1, 1)):
    self.blocks = nnx.List([Block(rngs) for _ in scales])
    self.scales = scales

  def __call__(self, x, mask):
    for block, scale in zip(self.blocks, self.scales):
      x = block(x, mask, scale=scale)
    return x


class Block(nnx.Module):

  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x, mask, scale=1):
    return x + scale * nnx.tanh(self.layer(x)) * mask


@pytest.mark.parametrize('scales, expected', [
    ((1, 1, 1), ['blocks/0', 'blocks/1', 'blocks/2']), ((1, 2, 2), ['blocks/1', 'blocks/2']), ((1, 2, 3), [])])
def test_blocks_that_are_called_alike_are_a_chain(scales, expected):
  batch = (jnp.zeros((2, 4)), jnp.ones((2, 4)))
  found = plan(Masked(nnx.Rngs(0), scales), batch, lambda model, batch: model(*batch))
  assert [s.block for s in found if s.block] == expected
  assert sorted(path for s in found for path in s.layers) == [f'blocks/{i}/layer' for i in range(3)]


def test_a_block_called_twice_is_no_part_of_a_chain():
  class Twice(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
      for layer in (*self.layers, self.layers[0]):
        x = layer(x)
      return x

  assert [s.block for s in plan(Twice(nnx.Rngs(0)), jnp.zeros((1, 4)))] == ['', '']


def test_sites_that_no_rule_names_are_not_solved():
  model = mlp.MLP((4, 4, 4), nnx.Rngs(0))
  found = plan(model, jnp.zeros((1, 4)), recipe=[qat.Rule('layers/1', weight=RECIPE[0].weight)])
  assert found == [stages.Stage('', ('layers/1',))]


class Odd(nnx.Module):
  """Layers whose names and order of definition say nothing of who reads what."""

  def __init__(self, rngs):
    self.down, self.q, self.up, self.o = (nnx.Linear(4, 4, rngs=rngs) for _ in range(4))
    self.bare = nnx.Param(jnp.ones((4, 4)))

  def __call__(self, x):
    y = self.up(x) * self.down(x)                                        # Both read x,
    return self.o(y) + self.q(self.o(x)) @ self.bare[...]                # `o` reads y first, and q what o returns.


def test_waves_are_layers_that_read_one_array():
  block = qat.quantize(Odd(nnx.Rngs(0)), RECIPE)
  layers = ('down', 'q', 'up', 'o', 'bare')
  assert stages.waves(block, call, jnp.zeros((1, 4)), layers) == [('bare',), ('up', 'down'), ('o',), ('q',)]


def test_waves_of_a_decoders_block():
  model = qat.quantize(decoder.llama(nnx.Rngs(0), vocab_size=11, context_length=8, width=16, layers=1, heads=2), RECIPE)
  layers = tuple(f'attention/{x}' for x in 'oqkv') + ('ffn/down', 'ffn/up', 'ffn/gate')
  found = stages.waves(model.blocks[0], call, jnp.zeros((1, 8, 16)), layers)
  assert [set(wave) for wave in found] == [
      {'attention/q', 'attention/k', 'attention/v'}, {'attention/o'}, {'ffn/gate', 'ffn/up'}, {'ffn/down'}]
