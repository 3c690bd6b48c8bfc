"""Integer products: every sum exact, whatever the zeros, the signs and the batch; and int8 in what runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.kernels import integer

ZERO8 = qarray.Zero(formats.UINT8)
# (the grid of x, the grid of w).
GRIDS = {
    'int8, int8': (specs.integer(8, specs.TOKEN), specs.integer(8, specs.CHANNEL)),
    'int8, int4': (specs.integer(8, specs.TOKEN), specs.integer(4, specs.CHANNEL)),
    'uint8, int4': (specs.integer(8, specs.TENSOR, signed=False), specs.integer(4, specs.CHANNEL)),
    'uint4, int2': (specs.integer(4, specs.TENSOR, signed=False), specs.integer(2, specs.CHANNEL)),
    'affine, int8': (specs.affine(8, specs.TOKEN), specs.integer(8, specs.CHANNEL)),
    'int8, affine': (specs.integer(8, specs.TOKEN), specs.affine(4, specs.CHANNEL)),
    'affine, affine': (specs.affine(8, specs.TOKEN), specs.affine(8, specs.CHANNEL)),
    'int8, binary': (specs.integer(8, specs.TOKEN), qarray.Spec(formats.BINARY, specs.CHANNEL)),
}
# (x, w).
SHAPES = {'matrices': ((5, 16), (16, 3)), 'a vector': ((16,), (16, 3)), 'a sequence': ((2, 5, 16), (16, 3)),
          'a batch': ((4, 5, 16), (4, 16, 3)), 'a batch of sequences': ((4, 2, 5, 16), (4, 16, 3))}


def whole(q):
  """Codes less their zeros, in 64 bits: int64[*shape]."""
  zero = 0 if q.zero is None else np.asarray(qarray.decode(q.zero), np.int64)
  return np.asarray(q.spec.format.decode(q.codes), np.int64) - zero


def exact_product(x, w):
  """The definition: whole numbers in 64 bits, then the scales."""
  batch = w.ndim - 2
  middle = x.ndim - batch - 2
  wide = lambda a: a.reshape(*a.shape[:batch], *(1,) * max(middle, 0), *a.shape[batch:])
  sums = whole(x) @ wide(whole(w))
  scale = wide(np.asarray(w.scale, np.float64))
  scale = scale[..., 0, :] if x.ndim == 1 else scale
  return sums, np.asarray(x.scale, np.float64) * scale


@functools.cache
def all_products():
  """Every grid with every shape, in one program."""
  keys = iter(jax.random.split(jax.random.key(0), 100))
  numbers = {(g, s): (jax.random.normal(next(keys), xs) + 0.3, jax.random.normal(next(keys), ws) + 0.1)
             for g in GRIDS for s, (xs, ws) in SHAPES.items()}

  @jax.jit
  def run(numbers):
    codes = {k: tuple(qarray.encode(a, spec) for a, spec in zip(v, GRIDS[k[0]])) for k, v in numbers.items()}
    return codes, {k: integer.matmul(*v) for k, v in codes.items()}

  return run(numbers)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('grid', GRIDS)
def test_sums_are_exact(grid, shape):
  codes, products = all_products()
  x, w = codes[grid, shape]
  sums, scale = exact_product(x, w)
  y = products[grid, shape]
  assert y.dtype == jnp.float32 and y.shape == sums.shape
  np.testing.assert_allclose(y, sums * scale, rtol=3e-7, atol=0)             # Two roundings, by the scales.


def test_long_sums_of_the_largest_codes_are_exact():
  k = 4096
  ones = jnp.ones((1, 1))
  x = qarray.QArray(jnp.full((2, k), -128, jnp.int8), ones, None, specs.integer(8, specs.TENSOR))
  w = qarray.QArray(jnp.full((k, 1), -128, jnp.int8), ones, None, specs.integer(8, specs.CHANNEL))
  np.testing.assert_array_equal(integer.matmul(x, w), 128 * 128 * k)


def test_fits_says_which_products_are_whole():
  fits = lambda spec, axis: integer.fits(qarray.encode(jnp.ones((64, 64)), spec), axis)
  assert fits(specs.integer(8, specs.TOKEN), -1) and fits(specs.affine(4, specs.CHANNEL), -2)
  assert fits(qarray.Spec(formats.BINARY, (None, None)), -2)
  assert not fits(specs.integer(4, (32, 1)), -2)                             # Scales change along the sum.
  assert not fits(specs.kernel(specs.Q4_1), -2) and not fits(specs.MXFP4, -1)
  assert not fits(qarray.Spec(formats.INT4, specs.CHANNEL, zero=qarray.Zero()), -2)  # Zeros are no whole numbers.


def test_the_program_multiplies_int8_into_int32():
  x = qarray.encode(jnp.ones((8, 64)), specs.integer(8, specs.TOKEN))
  w = qarray.encode(jnp.ones((64, 32)), specs.integer(8, specs.CHANNEL))
  program = jax.jit(integer.matmul).lower(x, w).as_text()  # tests/nn/test_dot.py reads the compiled one.
  assert '(tensor<8x64xi8>, tensor<64x32xi8>) -> tensor<8x32xi32>' in program
