"""A kernel runs on its device if it takes the operands; XLA multiplies elsewhere."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import hadamard as definition, qarray, specs
from qat.kernels import attention, attention_tpu, device, encode, encode_tpu, hadamard, hadamard_tpu, tokens


def module(d=128, t=256):
  def operands():
    x = jnp.zeros((2, t, d), jnp.bfloat16)
    cache = tokens.of(qarray.encode(x, specs.affine(4, specs.TOKEN)))
    return x[:, :4], cache, cache
  return device.module_for(attention.MODULES, *jax.eval_shape(operands))


@pytest.fixture
def on(monkeypatch):
  def set_to(name, capability=None):
    found = types.SimpleNamespace(device_kind=name, compute_capability=capability)
    monkeypatch.setattr(jax, 'default_backend', lambda: name)
    monkeypatch.setattr(jax, 'devices', lambda: [found])
  return set_to


def test_a_tpu_runs_its_own(on):
  on('tpu')
  assert module() is attention_tpu
  assert module(d=64) is None and module(t=100) is None


def test_kernels_for_hopper_run_on_hopper_alone(on, monkeypatch):
  fits = types.SimpleNamespace(unsupported=lambda *operands: None)
  monkeypatch.setitem(attention.MODULES, 'gpu', fits)
  on('gpu', '9.0')
  assert module() is fits
  on('gpu', '10.0')
  assert module() is None


def test_rows_are_encoded_and_rotated_in_any_shape(monkeypatch):
  """By the TPU's kernels in the interpreter: codes and scales to the bit, rotations to the rounding of sums."""
  run = dict(encode=functools.partial(encode_tpu.encode, interpret=True),
             transform=functools.partial(hadamard_tpu.transform, interpret=True))
  monkeypatch.setattr(device, 'module_for', lambda *operands: types.SimpleNamespace(**run))
  x = jax.random.normal(jax.random.key(0), (2, 3, 256))
  spec = specs.integer(8, specs.TOKEN)
  jax.tree.map(np.testing.assert_array_equal, encode.encode(x, spec), jax.jit(lambda x: qarray.encode(x, spec))(x))
  signs = jax.random.rademacher(jax.random.key(1), (256,), jnp.int8)
  np.testing.assert_allclose(hadamard.transform(x, signs), definition.transform(x, signs), atol=1e-5)
  slope = lambda f: jax.grad(lambda x: jnp.sin(f(x, signs)).sum())(x)
  np.testing.assert_allclose(slope(hadamard.transform), slope(definition.transform), atol=1e-5)


def kernel(x, scale):
  return {'y': jnp.sin(x) * scale, 'kernel': jnp.ones_like(x)}


def otherwise(x, scale):
  return {'y': jnp.sin(x) * scale, 'kernel': jnp.zeros_like(x)}


def test_a_kernel_runs_where_nothing_is_divided():
  """Eagerly, compiled, in scan and remat, and mapped over any axes; the results are those of the kernel."""
  run = lambda x: device.undivided(kernel, otherwise, x, static=(3,))
  x = jnp.arange(24.0).reshape(2, 3, 4)
  want = 3 * jnp.sin(x)
  for f in (run, jax.jit(run), jax.checkpoint(run), jax.vmap(run), jax.vmap(jax.vmap(run, 1, 1)),
            lambda x: jax.lax.scan(lambda _, x: (None, run(x)), None, x)[1]):
    found = f(x)
    np.testing.assert_allclose(found['y'], want, rtol=1e-6)
    assert found['kernel'].all()
  with jax.disable_jit():
    np.testing.assert_allclose(run(x)['y'], want, rtol=1e-6)
  assert 'sin' not in str(jax.make_jaxpr(run)(x))                        # Neither was traced yet into the program.


def test_a_cpu_has_none():
  assert module() is None
