"""quantize, calibrate and freeze on models that hold one module under several names, set in any order."""

from flax import nnx
import jax
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.nn import explain, quantized, recipes, rules
from qat.quantizers import lsq, ste
from tests.nn import zoo


def linear(seed):
  return nnx.Linear(zoo.WIDTH, zoo.WIDTH, rngs=nnx.Rngs(seed))


class Chain(nnx.Module):
  """Calls `layers(self)` one after the other."""

  def __call__(self, x):
    for layer in self.layers():
      x = nnx.relu(layer(x))
    return x


class OneParent(Chain):
  """Two names of one module, the later in the alphabet set first."""

  def __init__(self):
    self.z = linear(0)
    self.a = self.z

  def layers(self):
    return self.a, self.z


class Pair(nnx.Module):

  def __init__(self, outer, inner):
    self.outer, self.inner = outer, inner


class TwoParents(Chain):
  """A parent with a module inside, and that module, below other parents."""

  def __init__(self):
    inner = Pair(linear(0), linear(1))
    self.second = Pair(linear(2), inner)
    self.first = Pair(inner.outer, linear(3))
    self.copy = nnx.data({'of': [inner]})

  def layers(self):
    return self.second.outer, self.second.inner.outer, self.first.outer, self.second.inner.inner, self.first.inner


class InAList(Chain):
  """A list that repeats modules, more than ten long, after another name for one of them."""

  def __init__(self):
    tied, other = linear(0), linear(1)
    self.last = other
    self.blocks = nnx.List([tied] + [linear(i) for i in range(2, 11)] + [other, tied])

  def layers(self):
    return *self.blocks, self.last


PATHS = {OneParent: ['a'], InAList: [f'blocks/{i}' for i in (10, *range(10))],
         TwoParents: ['second/outer', 'copy/of/0/outer', 'copy/of/0/inner', 'first/inner']}
models = pytest.mark.parametrize('model', PATHS, ids=lambda m: m.__name__)


@models
def test_a_module_of_several_names_has_the_path_of_its_state(model):
  model = model()
  paths = PATHS[type(model)]
  assert [s.path for s in rules.sites(model)] == paths
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  assert {'/'.join(map(str, p[:-1])) for p, _ in flat} == set(paths)
  for copied in (nnx.clone(model), qat.quantize(model, recipes.get('w4a8'))):
    assert {s.path: s.module.kernel.shape for s in rules.sites(copied)} == dict.fromkeys(paths, (zoo.WIDTH, zoo.WIDTH))
    assert {r.path for r in qat.explain(copied).rows} == {r.path for r in qat.explain(model).rows}


@models
def test_it_is_quantized_calibrated_and_frozen_once(model):
  model, x = model(), jax.random.normal(jax.random.key(0), (5, zoo.WIDTH))
  paths = PATHS[type(model)]
  recipe = (qat.Rule(paths[0], lsq.LSQ(specs.integer(8, specs.CHANNEL)), ste.STE(specs.integer(8, specs.TOKEN))),
            *recipes.get('w4a4_lsq'))
  trained = qat.calibrate(qat.quantize(model, recipe), [x])
  frozen = qat.freeze(trained)
  for m in (trained, frozen):
    assert set(quantized.layers(m)) == set(explain.quantized_weights(m)) == set(paths)
    assert [str(quantized.of(layer).path) for layer in quantized.layers(m).values()] == list(quantized.layers(m))
    bits = {path: q.spec.format.bits for path, (_, q) in explain.quantized_weights(m).items()}
    assert bits == {path: 8 if path == paths[0] else 4 for path in paths}
    assert len({id(layer) for layer in m.layers()}) == len(paths)
  steps = [path for path, _ in nnx.to_flat_state(nnx.state(trained, nnx.Param)) if path[-2:] == ('quantizer', 's')]
  assert len(steps) == len(paths)
  run = nnx.jit(lambda trained, frozen, x: (trained(x), frozen(x)))
  np.testing.assert_array_equal(*run(trained, frozen, x))
