"""A prepared model computes what the frozen one does, from codes in a kernel's layout, whatever its structure."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.kernels import matmul_cpu, prepared
from qat.nn import quantized, recipes, weights
from qat.ptq import rotate
from qat.quantizers.ste import STE
from tests.nn import zoo

INT4 = STE(specs.integer(4, specs.CHANNEL))
INT8 = STE(specs.integer(8, specs.TOKEN))
RECIPES = {'weights': (qat.Rule('.*', INT4),), 'weights and inputs': (qat.Rule('.*', INT4, INT8),)}
kernel = pytest.mark.usefixtures('compiler')


@pytest.fixture
def compiler():
  """Skips where the kernels of CPUs cannot be built."""
  q = jax.eval_shape(lambda w: qat.encode(w, specs.integer(4, specs.CHANNEL)), jnp.ones((32, 16)))
  if why := matmul_cpu.unsupported(jnp.ones((1, 32)), q):
    pytest.skip(why)


def frozen(model, recipe):
  return qat.freeze(qat.quantize(model, RECIPES[recipe]))


@functools.cache
def results():
  """Of every structure and recipe, what the frozen and what the prepared model gives."""
  models = nnx.Dict({f'{name}, {recipe}': frozen(make(nnx.Rngs(0)), recipe)
                     for name, make in zoo.MODELS.items() for recipe in RECIPES})
  models.eval()
  xs = {key: zoo.example(key.split(',')[0]) for key in models}
  run = nnx.jit(lambda models, xs: {key: model(xs[key]) for key, model in models.items()})
  return run(models, xs), run(nnx.Dict({key: qat.prepare(model, 'cpu') for key, model in models.items()}), xs)


@kernel
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('name', zoo.MODELS)
def test_gives_what_the_frozen_model_gives(name, recipe):
  want, got = (outputs[f'{name}, {recipe}'] for outputs in results())
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 if recipe == 'weights' else 0.05 * np.abs(want).max())


@kernel
def test_products_are_in_the_layout_of_the_kernel_and_others_decoded():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.embed, self.conv = nnx.Embed(32, 16, rngs=rngs), nnx.Conv(16, 16, (3,), rngs=rngs)
      self.head = nnx.Linear(16, 32, rngs=rngs)

  model = qat.prepare(frozen(Model(nnx.Rngs(0)), 'weights'), 'cpu')
  held = {path: next(vars(layer)[name] for name in vars(layer)['quantizers'].weights)
          for path, layer in quantized.layers(model).items()}
  assert isinstance(held['head'].get_value(), prepared.Prepared)
  assert isinstance(held['conv'], weights.Decoded) and held['conv'].shape == (3, 16, 16)
  assert isinstance(held['embed'], weights.Decoded) and held['embed'].shape == (32, 16)
  table = str(qat.explain(model))
  assert 'cpu/1' in table and 'decoded' in table


@kernel
def test_no_decoded_weight_in_the_compiled_program():
  layer = frozen(nnx.Linear(192, 320, use_bias=False, rngs=nnx.Rngs(0)), 'weights')
  program = lambda model: nnx.jit(lambda m, x: m(x)).lower(model, jnp.ones((2, 192))).compile().as_text()
  decoded = r'f32\[(192,320|320,192)\]'
  assert re.search(decoded, program(layer))  # On CPU, what was not prepared is decoded at each call.
  assert not re.search(decoded, program(qat.prepare(layer, 'cpu')))


def test_what_others_prepare_for():
  layer = frozen(nnx.Linear(256, 128, rngs=nnx.Rngs(0)), 'weights')
  served = qat.prepare(layer, 'tpu')
  assert vars(served)['kernel'].get_value().layout == 'tpu/1'
  np.testing.assert_array_equal(served.kernel[...], layer.kernel[...])
  with pytest.raises(NotImplementedError, match="the input is float32"):
    served(jnp.ones((2, 256)))
  with pytest.raises(ValueError, match="'kernel' of layer '' holds floats"):
    qat.prepare(qat.quantize(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), RECIPES['weights']))
  with pytest.raises(ValueError, match="'npu'"):
    qat.prepare(layer, 'npu')
  assert qat.prepare(served, 'tpu').kernel.shape == (256, 128)  # Twice changes nothing.


def test_one_array_is_prepared_once():
  model = qat.prepare(frozen(zoo.Shared(nnx.Rngs(0)), 'weights'), 'tpu')
  assert vars(model.a)['kernel'] is vars(model.c)['kernel']


def kernels_on_tpu(f, x):
  """The names of the kernels in a program that is lowered for one TPU."""
  lowered = jax.jit(f).trace(x).lower(lowering_platforms=('tpu',)).as_text()
  return re.findall(r'kernel_name = "(\w+)"', lowered)


def test_frozen_models_of_other_devices_multiply_by_kernels(monkeypatch):
  """As on TPU, whose kernels take codes as they are."""
  layer = frozen(nnx.Linear(256, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), 'weights')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert kernels_on_tpu(lambda x: layer(x), jnp.ones((2, 256), jnp.bfloat16)) == ['matmul_int4']


def test_inputs_are_turned_and_encoded_by_kernels(monkeypatch):
  """As on TPU: a rotation, an encoding and a product, one pass each."""
  model = nnx.Sequential(nnx.Linear(256, 128, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0)))
  turned = qat.freeze(qat.quantize(rotate.rotate_inputs(model, 'layers/0'), recipes.get('w8a8')))
  x = jnp.ones((32, 256), jnp.bfloat16)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert kernels_on_tpu(lambda x: qat.prepare(turned)(x), x) == ['hadamard', 'encode', 'matmul_int8']


@kernel
def test_gradients_are_those_of_the_frozen_model():
  """Of the inputs, through products of codes: what adapters below a prepared layer learn from."""
  model = frozen(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), 'weights and inputs')
  served = qat.prepare(model, 'cpu')
  assert isinstance(vars(served)['kernel'].get_value(), prepared.Prepared)
  x = jax.random.normal(jax.random.key(0), (8, 64))
  slope = nnx.jit(nnx.grad(lambda model, x: jnp.sin(model(x)).sum(), argnums=1))
  np.testing.assert_allclose(slope(served, x), slope(model, x), atol=1e-5)


def test_a_gpu_without_kernels_keeps_the_codes(monkeypatch):
  layer = frozen(nnx.Linear(256, 128, rngs=nnx.Rngs(0)), 'weights')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert isinstance(vars(qat.prepare(layer))['kernel'].get_value(), qat.QArray)
  assert vars(qat.prepare(layer, 'tpu'))['kernel'].get_value().layout == 'tpu/1'
