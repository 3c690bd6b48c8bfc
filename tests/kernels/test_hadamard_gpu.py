"""The rotation of Hopper's kernel in the GPU interpreter, whose matrix products are the kernel's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import hadamard
from qat.kernels import hadamard_gpu, pipeline_gpu

interpreted = pytest.mark.skipif(pipeline_gpu.needs_jax() is not None, reason=str(pipeline_gpu.needs_jax()))


def rows(m, n):
  return jnp.asarray(np.random.default_rng(n + m).standard_normal((m, n)), jnp.bfloat16)


def assert_rotated(y, x):
  """One rounding to bfloat16, of a sum that is good to 2^-16 of what is added up."""
  expected = np.asarray(x, np.float64) @ hadamard.matrix(x.shape[-1]) / np.sqrt(x.shape[-1])
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-4)


@interpreted
@pytest.mark.parametrize('m, n', [(1, 8192), (3, 4096)])
def test_rotates_each_row(m, n):
  x = rows(m, n)
  assert_rotated(hadamard_gpu.transform(x, interpret=True), x)


@interpreted
def test_many_rows_a_block(monkeypatch):
  """7 rows on 2 processors: blocks of two steps, the last of which lacks a row; leading axes are kept."""
  monkeypatch.setattr(hadamard_gpu, 'PROCESSORS', 2)
  x = rows(7, 4096)
  y = hadamard_gpu.transform(x.reshape(7, 1, 4096), interpret=True)
  assert y.shape == (7, 1, 4096)
  assert_rotated(y.reshape(7, 4096), x)


def test_what_cannot_run_says_why(monkeypatch):
  monkeypatch.setattr(pipeline_gpu, 'needs_jax', lambda: None)
  why = lambda *shape, dtype=jnp.bfloat16: hadamard_gpu.unsupported(jax.ShapeDtypeStruct(shape, dtype))
  assert why(3, 4096) is None and why(2, 3, 8192) is None
  assert '14336 channels' in why(3, 14336) and '2048 channels' in why(3, 2048)
  assert 'the input is float32' in why(3, 4096, dtype=jnp.float32)
  assert 'empty' in why(0, 4096)
  with pytest.raises(NotImplementedError, match='Use core.hadamard.transform'):
    hadamard_gpu.transform(jnp.ones((3, 100), jnp.bfloat16))
