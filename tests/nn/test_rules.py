"""Rules: the first that matches, and an error for one without effect. Wrong input of quantize and freeze."""

from flax import nnx
import jax.numpy as jnp
import pytest

import qat
from qat.core import specs
from qat.nn import recipes, rules
from qat.quantizers import pact
from qat.quantizers.ste import STE
from tests.nn import zoo

W4, W8 = (STE(specs.integer(bits, specs.CHANNEL)) for bits in (4, 8))


class Model(nnx.Module):

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(4, 2, rngs=rngs)
    self.position = nnx.Param(jnp.ones((3, 4)))

  def __call__(self, x):
    return self.conv(x)


def weights(recipe):
  return {r.path: r.weight[4:13] for r in qat.explain(qat.quantize(Model(nnx.Rngs(0)), recipe)).rows if r.weight != '-'}


def test_the_first_match_wins_and_paths_are_whole():
  got = weights((qat.Rule('head', W8), qat.Rule(r'blocks/\d+', W4), qat.Rule('conv|position', W8)))
  assert got == {'conv': 'Spec(INT8', 'blocks/0': 'Spec(INT4', 'blocks/1': 'Spec(INT4', 'head': 'Spec(INT8',
                 'position': 'Spec(INT8'}


def test_a_rule_without_quantizers_leaves_floats():
  assert set(weights((qat.Rule('head|position'), qat.Rule('.*', W4)))) == {'conv', 'blocks/0', 'blocks/1'}


def test_kind_is_the_layers_class():
  assert set(weights((qat.Rule('.*', W4, kind='Linear'),))) == {'blocks/0', 'blocks/1', 'head'}
  assert set(weights((qat.Rule('.*', W4, kind='Param'),))) == {'position'}
  # A rule for a kind that the model lacks goes with one for the rest.
  assert 'conv' in weights((qat.Rule('.*', W8, kind='ConvTranspose'), qat.Rule('.*', W4)))


@pytest.mark.parametrize('recipe, message', [
    ((), r'The recipe is empty.*Give at least Rule'),
    ((qat.Rule('hed', W4),),
     r"No layer matches the rules \['hed'\].*The layers are \['position', 'conv', 'blocks/0'.*Did you mean 'head'"),
    ((qat.Rule('zzzz', W4), qat.Rule('.*', W4)), r"\['zzzz'\].*A path is matched whole"),
    ((qat.Rule('.*', W4), qat.Rule('head', W8)), r"The rules \['head'\] take effect nowhere.*Put them earlier"),
    ((qat.Rule('.*', W4, kind='Lineer'),), r"The rules \['\.\*'\] take effect nowhere.*their `kind` matches none"),
    ((qat.Rule('head', W4, kind='Conv'),), r"The rules \['head'\] take effect nowhere"),
    ((qat.Rule('head', STE(specs.integer(4, (32, 1)))),),
     r"Layer 'head', whose weight is 4 inputs x 2 outputs.*does not tile"),
    ((qat.Rule('head', pact.PACT(4)),), r"Layer 'head'.*it clips at 0"),
    (recipes.get('w4a8_kv4'), r"Rule\('\.\*'\)\.cache: it is for keys and values of attention"),
])
def test_wrong_recipes(recipe, message):
  with pytest.raises(ValueError, match=message):
    qat.quantize(Model(nnx.Rngs(0)), recipe)


def test_an_input_that_does_not_tile_names_the_layer():
  model = qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('head', input=STE(specs.MXFP4)),))
  with pytest.raises(ValueError, match=r"Layer 'head', called on an input of shape \(5, 4\).*does not tile"):
    model.head(jnp.ones((5, 4)))


@pytest.mark.parametrize('make, message', [
    (lambda: qat.Rule('*head'), r"Rule.path '\*head' is no regular expression.*Write '\.\*'"),
    (lambda: qat.Rule('head', kind=nnx.Linear), r'Rule.kind .* is no regular expression'),
    (lambda: qat.Rule('head', specs.MXFP4), r"Rule\('head'\).weight is Spec.*and no quantizer. Give an instance"),
    (lambda: qat.Rule('head', input=STE), r"Rule\('head'\).input is .*and no quantizer. Give an instance"),
    (lambda: qat.quantize(Model(nnx.Rngs(0)), 'w4a8'), r"The recipe 'w4a8' is a str: a recipe is a list of Rules"),
    (lambda: qat.quantize(Model(nnx.Rngs(0)), qat.Rule('.*', W4)), 'is a Rule: a recipe is a list of Rules'),
])
def test_what_is_no_rule_and_no_recipe_is_refused(make, message):
  with pytest.raises((TypeError, ValueError), match=message):
    make()


def test_a_frozen_weight_is_not_written_to_nor_quantized_again():
  frozen = qat.freeze(qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('.*', W4),)))
  for write in (lambda: frozen.head.kernel.set_value(jnp.ones((4, 2))), lambda: operator_set(frozen.head.kernel)):
    with pytest.raises(ValueError, match='A frozen weight of shape .* was written to'):
      write()
  with pytest.raises(ValueError, match=r"Layer 'position' is frozen.*Quantize the model that qat\.freeze was given"):
    qat.quantize(frozen, (qat.Rule('.*', W4),))


def operator_set(p):
  p[...] = jnp.ones(p.shape)


def test_freezing_twice_changes_nothing():
  frozen = qat.freeze(qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('.*', W4),)))
  assert qat.explain(qat.freeze(frozen)) == qat.explain(frozen)
  assert 'position' in {s.path for s in rules.sites(frozen)}


def test_a_stack_of_gains_says_to_leave_it_out():
  class Gain(nnx.Module):
    def __init__(self, rngs):
      self.gain = nnx.Param(rngs.normal((zoo.WIDTH,)))
    def __call__(self, x):
      return x * self.gain[...][None]

  @nnx.split_rngs(splits=2)
  @nnx.vmap
  def make(rngs):
    return Gain(rngs)

  run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  model = qat.quantize(make(nnx.Rngs(0)), (qat.Rule('.*', W4),))
  with pytest.raises(ValueError, match="'gain' of layer .*one of a stack of vectors.*Leave its path in floats"):
    run(model, zoo.example(''))


def test_an_attribute_named_quantizers_is_refused():
  class Own(nnx.Module):
    def __init__(self):
      self.quantizers, self.p = 3, nnx.Param(jnp.ones((4, 4)))

  with pytest.raises(ValueError, match="has an attribute 'quantizers' of its own.*Rename it"):
    qat.quantize(Own(), recipes.get('w8a16'))
