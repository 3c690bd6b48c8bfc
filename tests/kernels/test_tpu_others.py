"""The TPU's rotation, encoding and attention equal their definitions, run by the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, hadamard, qarray, specs
from qat.kernels import attention_tpu, attention_xla, encode_tpu, hadamard_tpu, tokens


def normal(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize('n', [128, 512, 1536])
def test_rotation_is_multiplication_by_the_hadamard_matrix(n):
  x = normal(5, n)
  expected = np.asarray(x, np.float64) @ hadamard.matrix(n).astype(np.float64) / np.sqrt(n)
  np.testing.assert_allclose(hadamard_tpu.transform(x, interpret=True), expected, atol=1e-5)
  low = hadamard_tpu.transform(x.astype(jnp.bfloat16), interpret=True)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.05)


def test_rotation_says_what_it_cannot():
  assert 'core of order 28' in hadamard_tpu.unsupported(jax.ShapeDtypeStruct((2, 28 * 128), jnp.float32))
  assert 'runs of 128' in hadamard_tpu.unsupported(jax.ShapeDtypeStruct((2, 576), jnp.float32))
  with pytest.raises(NotImplementedError, match='runs of 128'):
    hadamard_tpu.transform(jnp.ones((2, 64)))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('rows', [1, 45])
def test_encoding_gives_the_same_codes(rows, dtype):
  x = normal(rows, 256, dtype=dtype) * jnp.asarray(3, dtype)
  x = x.at[0].set(0) if rows > 1 else x
  for spec in (specs.integer(8, specs.TOKEN), specs.integer(8, specs.TOKEN, narrow=True)):
    found, expected = encode_tpu.encode(x, spec, interpret=True), jax.jit(lambda x: qarray.encode(x, spec))(x)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_encoding_says_what_it_cannot():
  with pytest.raises(NotImplementedError, match='other scales than one float32 a row'):
    encode_tpu.encode(jnp.ones((2, 128)), specs.integer(8, specs.TENSOR))
  assert 'not of signed 8-bit' in encode_tpu.unsupported(jnp.ones((2, 128)), specs.integer(4, specs.TOKEN))


def cache(spec, t=512):
  keys, values = normal(2, t, 128, seed=1), normal(2, t, 128, seed=2)
  return tokens.of(qarray.encode(keys, spec)), tokens.of(qarray.encode(values, spec))


@pytest.mark.parametrize('spec', [specs.integer(8, specs.TOKEN), specs.integer(4, specs.TOKEN),
                                  qarray.Spec(formats.FP8_E4M3, specs.TOKEN), specs.affine(8, specs.TOKEN),
                                  specs.affine(4, specs.TOKEN)], ids=str)
def test_attention_over_codes(spec):
  keys, values = cache(spec)
  query = normal(2, 4, 128, seed=3)
  for length in (1, 300, 512):
    k, v = (np.asarray(tokens.decode(c), np.float64)[:, :length] for c in (keys, values))
    p = np.exp(np.einsum('hgd,htd->hgt', np.asarray(query, np.float64), k) / np.sqrt(128))
    expected = np.einsum('hgt,htd->hgd', p / p.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attention_xla.decode(query, keys, values, length), expected, atol=1e-5)
    found = attention_tpu.decode(query, keys, values, jnp.int32(length), interpret=True)
    np.testing.assert_allclose(found, expected, atol=0.03)                # The query and probabilities in bfloat16.


def test_attention_says_what_it_cannot():
  keys, values = cache(specs.integer(8, specs.TOKEN))
  with pytest.raises(ValueError, match='no .kv_heads, group, d.'):
    attention_xla.decode(normal(3, 4, 128), keys, values, 1)
  with pytest.raises(NotImplementedError, match='whole tiles'):
    attention_tpu.decode(normal(2, 4, 128), *cache(specs.integer(8, specs.TOKEN), t=64), 1)
