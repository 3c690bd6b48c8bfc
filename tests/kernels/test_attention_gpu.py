"""Attention over a cache of 8 and 4 bits by Hopper's kernel in the GPU interpreter, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.kernels import attention_gpu, attention_xla, pipeline_gpu, tokens

interpreted = pytest.mark.skipif(pipeline_gpu.needs_jax() is not None, reason=str(pipeline_gpu.needs_jax()))


INT8, UINT8, UINT4 = specs.integer(8, specs.TOKEN), *(specs.affine(bits, specs.TOKEN) for bits in (8, 4))


def cache(h, g, t, d, spec=INT8):
  rng = np.random.default_rng(t)
  numbers = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  encode = jax.jit(lambda a: tokens.of(qarray.encode(a, spec)))
  return numbers(h, g, d).astype(jnp.bfloat16), encode(numbers(h, t, d)), encode(numbers(h, t, d))


@interpreted
@pytest.mark.parametrize('h, g, t, d, length, spec', [
    (2, 4, 256, 128, 200, INT8), (1, 1, 512, 64, 3, INT8), (1, 8, 128, 128, 128, INT8), (1, 8, 256, 64, 200, UINT8),
    (2, 2, 128, 128, 100, UINT4)])
def test_equals_the_definition(h, g, t, d, length, spec, monkeypatch):
  """Parts that are masked as a whole count for nothing; several steps a part, and several parts."""
  monkeypatch.setattr(attention_gpu, 'PROCESSORS', 2)
  query, keys, values = cache(h, g, t, d, spec)
  y = attention_gpu.decode(query, keys, values, jnp.int32(length), interpret=True)
  expected = attention_xla.decode(query.astype(jnp.float32), keys, values, jnp.int32(length))
  assert y.dtype == jnp.bfloat16 and y.shape == (h, g, d)
  np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=2.0**-7 * float(jnp.abs(expected).max()), rtol=0)


def test_what_cannot_run_says_why(monkeypatch):
  monkeypatch.setattr(pipeline_gpu, 'needs_jax', lambda: None)

  def why(h=2, g=4, t=256, d=128, spec=INT8):
    return attention_gpu.unsupported(*jax.eval_shape(lambda: cache(h, g, t, d, spec)))
  assert why() is None
  assert 'reads int4, int8' in why(spec=qarray.Spec(formats.FP8_E4M3, specs.TOKEN))
  assert 'whole 128 tokens' in why(t=200) and 'by 64 or 128' in why(d=96)
  assert '64 heads a group' in why(g=65)
  assert why(spec=UINT8) is None and why(spec=UINT4) is None
  with pytest.raises(NotImplementedError, match='Use attention_xla.decode'):
    attention_gpu.decode(*cache(1, 1, 8, 64), jnp.int32(3))
