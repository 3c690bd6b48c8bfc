"""Products of codes on Hopper in the GPU interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.kernels import pipeline_gpu, scaled_matmul_gpu, tiles_gpu

interpreted = pytest.mark.skipif(pipeline_gpu.needs_jax() is not None, reason=str(pipeline_gpu.needs_jax()))

FP8, FP8_E5M2 = (qarray.Spec(f, specs.TOKEN) for f in (formats.FP8_E4M3, formats.FP8_E5M2))
# The grids of x and of w.
PAIRS = {
    'int8, int8': (specs.integer(8, specs.TOKEN), specs.integer(8, specs.CHANNEL)),
    'static int8, int4': (specs.integer(8, specs.TENSOR), specs.integer(4, specs.CHANNEL)),
    'int4, affine': (specs.integer(4, specs.TOKEN), specs.affine(8, specs.CHANNEL)),
    'int8, uint4 with zeros': (specs.integer(8, specs.TOKEN), specs.affine(4, specs.CHANNEL)),
    'int8, binary': (specs.integer(8, specs.TOKEN), qarray.Spec(formats.BINARY, specs.CHANNEL)),
    'fp8, fp8': (FP8, specs.kernel(FP8)), 'fp8 of two kinds': (FP8_E5M2, specs.kernel(FP8))}


def wide(a):
  return np.asarray(a, np.float64)


@functools.cache
def operands(pair, m, k=256, n=128):
  rng = np.random.default_rng(m)
  x, w = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32) + 0.1
  encode = jax.jit(qarray.encode, static_argnums=1)
  return encode(x, PAIRS[pair][0]), encode(w, PAIRS[pair][1])


def assert_product(y, x, w):
  expected = wide(qarray.decode(x)) @ wide(qarray.decode(w))
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * abs(expected).max())


@interpreted
@pytest.mark.parametrize('pair', PAIRS)
def test_equals_the_product_in_float64(pair):
  x, w = operands(pair, 16)
  assert scaled_matmul_gpu.unsupported(x, w) is None
  assert_product(scaled_matmul_gpu.matmul(x, scaled_matmul_gpu.prepare(w), interpret=True), x, w)


@interpreted
@pytest.mark.parametrize('m, k, n', [(1, 256, 128), (33, 256, 128), (130, 128, 128), (8, 200, 72)])
def test_shapes_are_padded(m, k, n):
  x, w = operands('int4, affine', m, k, n)
  assert_product(scaled_matmul_gpu.matmul(x, scaled_matmul_gpu.prepare(w), interpret=True), x, w)


@interpreted
def test_splits_add_the_offset_once():
  x, w = operands('int4, affine', 8)
  tiles = tiles_gpu.Tiles(8, stages=1, splits=2)
  assert_product(scaled_matmul_gpu.matmul(x, scaled_matmul_gpu.prepare(w), tiles, interpret=True), x, w)


@interpreted
def test_no_races():
  from jax.experimental.pallas import mosaic_gpu as plgpu
  x, w = operands('int8, int8', 8, k=512)
  tiles = tiles_gpu.Tiles(8, stages=3, splits=1)
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  assert_product(scaled_matmul_gpu.matmul(x, scaled_matmul_gpu.prepare(w), tiles, interpret), x, w)


@interpreted
def test_the_result_may_be_bfloat16():
  x, w = operands('fp8, fp8', 16)
  y = scaled_matmul_gpu.matmul(x, scaled_matmul_gpu.prepare(w), interpret=True, dtype=jnp.bfloat16)
  expected = wide(qarray.decode(x)) @ wide(qarray.decode(w))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(wide(y), expected, rtol=2.0**-8)


@pytest.mark.parametrize('pair', PAIRS)
def test_prepared_weights_decode_to_the_same_numbers(pair):
  _, w = operands(pair, 3, 200, 72)
  np.testing.assert_allclose(scaled_matmul_gpu.decode(scaled_matmul_gpu.prepare(w)), qarray.decode(w), rtol=1e-6,
                             atol=1e-6)


def test_what_cannot_run_says_why(monkeypatch):
  monkeypatch.setattr(pipeline_gpu, 'needs_jax', lambda: None)

  def why(x, w, m=16, k=256):
    shapes = jax.ShapeDtypeStruct((m, k), jnp.float32), jax.ShapeDtypeStruct((256, 128), jnp.float32)
    return scaled_matmul_gpu.unsupported(*(jax.eval_shape(lambda a: qarray.encode(a, s), shape)
                                           for s, shape in zip((x, w), shapes)))
  int8, weight = PAIRS['int8, int8']
  assert why(int8, weight) is None
  assert 'no [m, k] and [k, n]' in why(int8, weight, k=128)
  assert 'one scale a row' in why(specs.integer(8, (64,)), weight)
  assert 'signed integers and fp8' in why(specs.integer(8, specs.TENSOR, signed=False), weight)
  assert 'signed integers and fp8' in why(specs.affine(8, specs.TOKEN), weight)
  assert 'INT8 does not multiply FP8_E4M3' in why(int8, specs.kernel(FP8))
  assert 'FP8_E4M3 does not multiply NF4' in why(FP8, specs.kernel(specs.NF4))
  assert 'groups of 128 inputs' in why(int8, specs.integer(4, (128, 1)))
  with pytest.raises(ValueError, match="this kernel reads 'gpu-sm90-codes/1'"):
    x, w = operands('int8, int8', 16)
    p = scaled_matmul_gpu.prepare(w)
    scaled_matmul_gpu.matmul(x, type(p)(p.arrays, p.spec, p.shape, 'gpu-sm90/1'))
