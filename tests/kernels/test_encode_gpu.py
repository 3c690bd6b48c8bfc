"""Hopper's encoding equals its definition, run by the GPU interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.kernels import encode_gpu, pipeline_gpu

interpreted = pytest.mark.skipif(pipeline_gpu.needs_jax() is not None, reason=str(pipeline_gpu.needs_jax()))
INT8, FP8 = specs.integer(8, specs.TOKEN), qarray.Spec(formats.FP8_E4M3, specs.TOKEN)
NARROW = specs.integer(8, specs.TOKEN, narrow=True)


def assert_same(x, spec):
  found, expected = encode_gpu.encode(x, spec, interpret=True), jax.jit(lambda x: qarray.encode(x, spec))(x)
  assert found.spec == spec and found.codes.dtype == expected.codes.dtype and found.zero is None
  bits = lambda a: np.asarray(a).view(np.uint8)
  np.testing.assert_array_equal(bits(found.codes), bits(expected.codes))
  np.testing.assert_array_equal(bits(found.scale), bits(expected.scale))


@interpreted
@pytest.mark.parametrize('spec', [INT8, NARROW, FP8], ids=str)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('m, k', [(1, 4096), (5, 1024), (3, 1152)])
def test_gives_the_same_codes(m, k, dtype, spec):
  """A run of 1152 channels takes loads of one element; rows are large, tiny and zero."""
  rng = np.random.default_rng(m)
  x = rng.standard_normal((m, k)) * np.resize([3, 1e30, 0, 1e-30, 1], (m, 1))
  assert_same(jnp.asarray(x, dtype), spec)


@interpreted
def test_multiplies_by_the_reciprocal():
  """Numbers half-way between codes, where a division gives other codes than the product does."""
  largest = np.random.default_rng(0).uniform(1, 2, (16, 1))
  x = jnp.asarray(np.hstack([largest, largest / 127 * (np.arange(127) + 0.5)]), jnp.float32)
  assert_same(x, INT8)
  q = qarray.encode(x, INT8)
  assert (np.rint(np.asarray(x) / np.asarray(q.scale)) != np.asarray(q.codes)).any()   # Not by jnp: XLA multiplies.


def test_what_cannot_run_says_why(monkeypatch):
  monkeypatch.setattr(pipeline_gpu, 'needs_jax', lambda: None)
  why = lambda *shape, spec=INT8, dtype=jnp.bfloat16: encode_gpu.unsupported(jax.ShapeDtypeStruct(shape, dtype), spec)
  assert why(3, 128) is None and why(1, 16384, spec=FP8, dtype=jnp.float32) is None and why(2, 384, spec=NARROW) is None
  assert '100 channels' in why(3, 100) and '32768 channels' in why(3, 32768)
  assert 'the input is float16' in why(3, 128, dtype=jnp.float16) and why(2, 3, 128) is None
  assert 'other scales' in why(3, 128, spec=specs.integer(8, (128,)))
  assert 'other scales' in why(3, 128, spec=specs.affine(8, specs.TOKEN))
  for spec in specs.integer(4, specs.TOKEN), specs.integer(8, specs.TOKEN, signed=False):
    assert 'neither of signed 8-bit integers nor FP8_E4M3' in why(3, 128, spec=spec)
  assert 'empty' in why(0, 128) and 'empty' in why(3, 0)
  with pytest.raises(NotImplementedError, match='Use qat.encode'):
    encode_gpu.encode(jnp.ones((3, 100), jnp.bfloat16), INT8)


def test_older_jax_is_told(monkeypatch):
  monkeypatch.setattr(jax, '__version__', '0.10.0')
  with pytest.raises(NotImplementedError, match='this is jax 0.10.0'):
    encode_gpu.encode(jnp.ones((3, 128)), INT8)
