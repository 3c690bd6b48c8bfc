"""What Blackwell is given is x @ w: cuDNN's product stands in by what jax.nn.scaled_matmul documents."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import qarray, specs
from qat.kernels import block_scaled, matmul, prepared
from qat.nn import dot, recipes
from qat.quantizers import ste

GRIDS = {'MXFP8': specs.MXFP8, 'MXFP8 E5M2': specs.MXFP8_E5M2, 'NVFP4': specs.NVFP4}


def documented(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type):
  wide = lambda a, s: a.astype(jnp.float32) * jnp.repeat(s.astype(jnp.float32), a.shape[-1] // s.shape[-1], axis=-1)
  return jnp.einsum('bmk,bnk->bmn', wide(lhs, lhs_scales), wide(rhs, rhs_scales), precision='highest',
                    preferred_element_type=preferred_element_type)


@pytest.fixture(autouse=True)
def blackwell(monkeypatch):
  monkeypatch.setattr(jax.nn, 'scaled_matmul', documented)


def operands(spec, *lead):
  x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((*lead, 2, 3, 64), (*lead, 64, 24))))
  return qarray.encode(x, spec), qarray.encode(w, specs.kernel(spec))


@pytest.mark.parametrize('name', GRIDS)
@pytest.mark.parametrize('lead', [(), (5,)])
def test_equals_the_product_in_float64(name, lead):
  x, w = operands(GRIDS[name], *lead)
  assert block_scaled.fits(x, -1) and block_scaled.fits(w, -2) and not block_scaled.fits(w, -1)
  a, b = (np.asarray(qarray.decode(q), np.float64) for q in (x, w))
  np.testing.assert_allclose(jax.jit(block_scaled.matmul)(x, w), np.einsum('...rtk,...kn->...rtn', a, b), atol=2e-5)


@pytest.mark.parametrize('x, w', [
    (specs.MXFP8, specs.NVFP4), (specs.MXFP8, specs.MXFP8_E5M2),
    (dataclasses.replace(specs.NVFP4, scale=dataclasses.replace(specs.NVFP4.scale, block=None)), specs.NVFP4),
    (specs.NVFP4, dataclasses.replace(specs.NVFP4, scale=dataclasses.replace(specs.NVFP4.scale, block=(None,))))])
def test_operands_of_two_grids_are_not_multiplied(x, w):
  a, b = operands(x)[0], operands(w)[1]
  assert not block_scaled.fit(a, b) and block_scaled.fit(*operands(specs.NVFP4))


@pytest.mark.parametrize('spec', [specs.MXFP4, specs.MXINT8, specs.integer(8, (32,)), specs.integer(8, specs.TOKEN)])
def test_other_grids_do_not_fit(spec):
  assert not block_scaled.fits(qarray.encode(jnp.ones((4, 64)), spec), -1)


@pytest.mark.parametrize('recipe', ['mxfp8', 'nvfp4'])
def test_layers_multiply_codes_where_the_device_does(recipe, monkeypatch):
  x = jax.random.normal(jax.random.key(0), (5, 64))
  model = qat.quantize(nnx.Linear(64, 16, rngs=nnx.Rngs(0)), recipes.get(recipe))
  run = lambda m: (m(x), nnx.grad(lambda m: (m(x) ** 2).sum())(m).kernel[...])
  decoded, slope = run(model)
  calls = []
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(block_scaled, 'available', lambda: True)
  monkeypatch.setattr(jax.nn, 'scaled_matmul', lambda *args, **kw: calls.append(1) or documented(*args, **kw))
  dot.code_product.clear_cache()
  y, coded_slope = run(model)
  assert calls
  np.testing.assert_allclose(y, decoded, atol=2e-5)
  np.testing.assert_allclose(coded_slope, slope, atol=1e-3)
  np.testing.assert_allclose(qat.freeze(model)(x), y, atol=1e-6)


def test_dispatch_of_two_qarrays(monkeypatch):
  x, w = operands(specs.MXFP8)
  expected = matmul.matmul(x, w)
  monkeypatch.setattr(block_scaled, 'available', lambda: True)
  np.testing.assert_allclose(matmul.matmul(x, w), expected, atol=2e-5)


@pytest.mark.parametrize('name', GRIDS)
def test_a_prepared_weight_gives_the_same_bits(name):
  x, w = operands(GRIDS[name])
  p = block_scaled.prepare(w)
  assert p.layout == 'gpu-sm100/1' and p.target == 'gpu' and p.arrays['codes'].shape == (24, 64)
  np.testing.assert_array_equal(block_scaled.matmul(x, p), block_scaled.matmul(x, w))
  np.testing.assert_array_equal(matmul.decode(p, jnp.bfloat16), qarray.decode(w, jnp.bfloat16))
  bits = w.spec.format.bits + 8 / (64 // p.arrays['scale'].shape[1])
  assert p.nbits == 64 * 24 * bits + (32 if name == 'NVFP4' else 0)
  y = jax.jit(matmul.matmul)(x, p)
  assert y.shape == (2, 3, 24)
  np.testing.assert_allclose(y, block_scaled.matmul(x, w), atol=1e-6)  # One matrix of rows.


def test_what_is_not_prepared_says_why():
  w, (stack_x, stack) = operands(specs.MXFP8)[1], operands(specs.MXFP8, 5)
  other = operands(specs.MXFP8_E5M2)[0]
  p = block_scaled.prepare(w)
  with pytest.raises(NotImplementedError, match='both are MXFP8, or both NVFP4'):
    matmul.matmul(other, p)
  with pytest.raises(NotImplementedError, match="reads 'gpu-sm90/1'"):
    matmul.matmul(jnp.ones((2, 64), jnp.bfloat16), p)
  assert 'float32' in block_scaled.unsupported(jnp.ones((2, 64)), w)
  assert 'no [k, n]' in block_scaled.unsupported(stack_x, stack)
  for bad in (stack, qarray.encode(jnp.ones((64, 24)), specs.integer(8, specs.CHANNEL))):
    with pytest.raises(NotImplementedError, match='Keep the QArray'):
      block_scaled.prepare(bad)


@pytest.fixture
def on_blackwell(monkeypatch):
  """Dispatch as there; devices that are no Hopper's."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(block_scaled, 'available', lambda: True)


@pytest.mark.parametrize('recipe', ['mxfp8', 'nvfp4'])
def test_models_are_prepared_on_blackwell(recipe, on_blackwell):
  x = jax.random.normal(jax.random.key(0), (2, 5, 64))
  dot.code_product.clear_cache()
  model = qat.freeze(qat.quantize(nnx.Linear(64, 16, rngs=nnx.Rngs(0)), recipes.get(recipe)))
  served = qat.prepare(model)
  assert vars(served)['kernel'].get_value().layout == 'gpu-sm100/1'
  np.testing.assert_allclose(served(x), model(x), atol=1e-6)
  np.testing.assert_array_equal(served.kernel[...], model.kernel[...])


def test_other_models_stay_as_they_are_on_blackwell(on_blackwell):
  for spec in (specs.integer(4, specs.CHANNEL), specs.kernel(specs.MXFP8)):
    rule = qat.Rule('.*', ste.STE(spec))
    served = qat.prepare(qat.freeze(qat.quantize(nnx.Linear(64, 16, rngs=nnx.Rngs(0)), [rule])))
    assert isinstance(vars(served)['kernel'].get_value(), qat.QArray)


def test_the_layout_is_of_the_device_or_of_the_weight(on_blackwell):
  x, w = operands(specs.MXFP8)
  assert matmul.prepare(w, inputs=specs.MXFP8).layout == block_scaled.LAYOUT
  assert matmul.explain(x, w)['gpu'] is None
  np.testing.assert_allclose(matmul.matmul(x, w, implementation='gpu'), block_scaled.matmul(x, w), atol=1e-6)
  with pytest.raises(NotImplementedError, match='the kernels are for 9.0'):
    matmul.matmul(jnp.ones((2, 64), jnp.bfloat16), w, implementation='gpu')


def test_a_layout_of_hopper_is_refused_there(on_blackwell, monkeypatch):
  monkeypatch.setattr(matmul.scaled_matmul_gpu, 'unsupported', lambda x, w: None)
  p = prepared.Prepared({'codes': jnp.zeros((24, 64), jnp.int8)}, specs.integer(8, specs.CHANNEL), (64, 24),
                        matmul.scaled_matmul_gpu.LAYOUT)
  x = qarray.encode(jnp.ones((2, 64)), specs.integer(8, specs.TOKEN))
  with pytest.raises(NotImplementedError, match='the kernels are for 9.0'):
    matmul.choose(x, p, 'gpu')


def test_other_devices_have_none():
  assert not block_scaled.available()
