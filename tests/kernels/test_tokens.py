"""A cache of attention in the form of kernels holds the numbers of its QArray."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.kernels import tokens

GRIDS = {'int8': specs.integer(8, specs.TOKEN), 'affine8': specs.affine(8, specs.TOKEN),
         'affine4': specs.affine(4, specs.TOKEN), 'fp8': qarray.Spec(formats.FP8_E4M3, specs.TOKEN),
         'min': qarray.Spec(formats.UINT4, specs.TOKEN, zero=qarray.Min()),
         'hqq': qarray.Spec(formats.UINT4, specs.TOKEN, zero=qarray.Zero())}


def numbers(t, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal((2, t, 8)) + 0.5, jnp.float32)


@pytest.mark.parametrize('spec', GRIDS.values(), ids=GRIDS)
def test_decodes_to_the_same_bits(spec):
  q = jax.jit(lambda x: qarray.encode(x, spec))(numbers(6))
  held = tokens.of(q)
  np.testing.assert_array_equal(jax.jit(tokens.decode)(held), jax.jit(qarray.decode)(q))
  value = np.asarray(held.format.decode(held.codes)) * np.swapaxes(held.scale, 1, 2)
  offset = 0 if held.offset is None else np.swapaxes(held.offset, 1, 2)
  np.testing.assert_allclose(value + offset, qarray.decode(q), atol=1e-6)


def test_unsigned_codes_of_4_bits_are_held_in_4():
  held = tokens.of(qarray.encode(numbers(4), GRIDS['affine4']))
  assert held.codes.dtype == jnp.int4 and held.format == formats.INT4


def test_tokens_are_written_one_after_the_other():
  spec = GRIDS['affine8']
  of = jax.jit(lambda x: tokens.of(qarray.encode(x, spec)))
  x = numbers(6)
  held = jax.tree.map(jnp.zeros_like, of(x))
  for start, run in ((0, 3), (3, 1), (4, 2)):
    held = jax.jit(tokens.Tokens.write)(held, of(x[:, start:start + run]), jnp.int32(start))
  jax.tree.map(np.testing.assert_array_equal, held, of(x))


def test_what_has_no_tokens_says_why():
  with pytest.raises(ValueError, match='not one scale a token'):
    tokens.of(qarray.encode(numbers(4), specs.integer(8, specs.TENSOR)))
  with pytest.raises(ValueError, match='no .heads, tokens, d.'):
    tokens.of(qarray.encode(numbers(4)[0], specs.integer(8, specs.TOKEN)))
  with pytest.raises(ValueError, match='has a codebook'):
    tokens.of(qarray.encode(numbers(4), qarray.Spec(specs.NF4.format, specs.TOKEN)))
