"""Hopper's kernel in the GPU interpreter, against float64: fetches, groups, offsets, splits, padding. Registers are not
interpreted: tests/kernels/test_unpack_gpu.py has their bits, tests/aot/test_gpu.py their compilation."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.kernels import matmul_gpu, pipeline_gpu, tiles_gpu

interpreted = pytest.mark.skipif(pipeline_gpu.needs_jax() is not None, reason=str(pipeline_gpu.needs_jax()))

SPECS = {
    'int4 by 128': specs.integer(4, (128, 1)), 'int4 an output': specs.integer(4, specs.CHANNEL),
    'int4 by 32': specs.integer(4, (32, 1)), 'int4 a tensor': specs.integer(4, specs.TENSOR),
    'int2 by 64': specs.integer(2, (64, 1)), 'uint4 by 128': specs.integer(4, (128, 1), signed=False),
    'uint4 with zeros': specs.affine(4, (64, 1)), 'Q4_1': specs.kernel(specs.Q4_1), 'NF4': specs.kernel(specs.NF4),
    'NF4 with double quantization': specs.kernel(specs.NF4_DQ), 'MXFP4': specs.kernel(specs.MXFP4),
    'NVFP4': specs.kernel(specs.NVFP4), 'int8 an output': specs.integer(8, specs.CHANNEL),
    'uint8 with zeros': specs.affine(8, (128, 1)), 'fp8': qarray.Spec(formats.FP8_E4M3, specs.CHANNEL),
    'bare fp8': qarray.Spec(formats.FP8_E5M2, None), 'tiles': specs.integer(4, (128, 64))}


def wide(a):
  return np.asarray(a, np.float64)


def inputs(rows, k=256):
  return jnp.asarray(np.random.default_rng(rows).standard_normal((rows, k)), jnp.bfloat16)


@functools.cache
def weight(spec, k=256, n=128):
  w = np.random.default_rng(n).standard_normal((k, n)).astype(np.float32) + 0.1
  return jax.jit(lambda w: qarray.encode(w, SPECS[spec]))(w)


def assert_product(y, x, q, roundings=1):
  """Half a unit of bfloat16 in the result; tables, and weights that are scaled first, are rounded to it too."""
  x, w = wide(x), wide(qarray.decode(q))
  np.testing.assert_allclose(wide(y), x @ w, rtol=2.0**-8, atol=roundings * 2.0**-9 * (abs(x) @ abs(w)).max() / 4)
  assert abs(wide(y) - x @ w).mean() < roundings * 2.0**-9 * abs(x @ w).mean()


@interpreted
@pytest.mark.parametrize('spec', SPECS)
def test_equals_the_product_in_float64(spec):
  q, x = weight(spec), inputs(16)
  y = matmul_gpu.matmul(x, matmul_gpu.prepare(q), interpret=True)
  assert y.dtype == jnp.bfloat16 and y.shape == (16, 128)
  assert_product(y, x, q, roundings=2 if spec.startswith('NF4') else 1)


@interpreted
@pytest.mark.parametrize('rows', [1, 8, 33, 70])
def test_rows(rows):
  """Padded to 8; from 65 on, scales multiply weights, and zeros are taken from codes before."""
  for spec in ('int4 by 128', 'uint4 with zeros', 'Q4_1')[:2 if rows < 65 else 3]:
    q, x = weight(spec), inputs(rows)
    p = matmul_gpu.prepare(q)
    assert tiles_gpu.after(p, tiles_gpu.heuristic(rows, p)) == (rows <= 64)
    assert_product(matmul_gpu.matmul(x, p, interpret=True), x, q, roundings=1 if rows <= 64 else 2)


@interpreted
@pytest.mark.parametrize('k, n', [(200, 72), (320, 256), (512, 256)])
def test_padding_and_splits(k, n):
  spec = qarray.Spec(formats.INT4, (64, 1) if k == 320 else specs.CHANNEL)
  q = jax.jit(lambda w: qarray.encode(w, spec))(np.random.default_rng(k).standard_normal((k, n)).astype(np.float32))
  p, x = matmul_gpu.prepare(q), inputs(3, k)
  assert p.shape == (k, n) and p.arrays['codes'].shape == (-(-n // 128) * 128, -(-k // 128) * 128)
  tiles = tiles_gpu.Tiles(8, 64, 128, stages=1, splits=p.arrays['codes'].shape[1] // 128)
  for t in (None, tiles):
    assert_product(matmul_gpu.matmul(x, p, t, interpret=True), x, q)


@interpreted
@pytest.mark.parametrize('spec', ['int4 by 128', 'uint4 with zeros'])
def test_no_races(spec):
  """Nothing is read before it is there, nor written where it is still read: jax 0.12 raises."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  q, x = weight(spec, k=512), inputs(8, 512)
  p = matmul_gpu.prepare(q)
  tiles = tiles_gpu.Tiles(8, stages=2, splits=1)
  y = matmul_gpu.matmul(x, p, tiles, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert_product(y, x, q)


@interpreted
def test_beyond_256_rows_the_weight_is_decoded_once():
  q, x = weight('uint4 with zeros'), inputs(300)
  assert_product(matmul_gpu.matmul(x, matmul_gpu.prepare(q)), x, q, roundings=2)


@pytest.mark.parametrize('spec', SPECS)
def test_prepared_weights_decode_to_the_same_numbers(spec):
  q = weight(spec, n=128 if spec == 'tiles' else 72)
  tolerance = dict(rtol=2.0**-8) if spec.startswith('NF4') else dict(rtol=1e-6)
  p = matmul_gpu.prepare(q)
  np.testing.assert_allclose(matmul_gpu.decode(p, jnp.float32), qarray.decode(q), atol=1e-6, **tolerance)


def test_scales_stay_exact():
  dtype = lambda spec: matmul_gpu.prepare(weight(spec)).arrays['scale'].dtype
  assert dtype('int4 by 128') == dtype('Q4_1') == dtype('NVFP4') == jnp.float32
  assert dtype('MXFP4') == jnp.bfloat16                                  # Powers of two.


def test_what_cannot_run_says_why(monkeypatch):
  monkeypatch.setattr(pipeline_gpu, 'needs_jax', lambda: None)
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
  coded = lambda spec, *s: jax.eval_shape(lambda w: qarray.encode(w, spec), jax.ShapeDtypeStruct(s, jnp.float32))
  why = lambda x, spec, *s: matmul_gpu.unsupported(x, coded(spec, *s))
  int4 = SPECS['int4 by 128']
  assert why(shape(16, 256), int4, 256, 128) is None
  assert 'the kernel multiplies bfloat16' in why(jax.ShapeDtypeStruct((16, 256), jnp.float32), int4, 256, 128)
  assert 'no [m, k] and [k, n]' in why(shape(16, 128), int4, 256, 128)
  assert 'no [m, k] and [k, n]' in why(shape(0, 256), int4, 256, 128)
  assert 'FP6_E2M3 is not unpacked' in why(shape(16, 256), specs.kernel(specs.MXFP6), 256, 128)
  assert 'runs along the outputs' in why(shape(16, 256), specs.NF4, 256, 128)
  assert 'groups of 96 inputs' in why(shape(16, 192), specs.integer(4, (96, 1)), 192, 128)
  assert 'groups of 8 inputs' in why(shape(16, 192), specs.integer(4, (8, 1)), 192, 128)
  assert why(shape(16, 192), specs.integer(4, specs.CHANNEL), 192, 128) is None
  with pytest.raises(NotImplementedError, match='FP6_E2M3 is not unpacked.*Keep the QArray'):
    coded_fp6 = qarray.encode(jnp.ones((64, 8)), specs.kernel(specs.MXFP6))
    matmul_gpu.prepare(coded_fp6)
  with pytest.raises(NotImplementedError, match='the input is float32.*Decode the weight'):
    matmul_gpu.matmul(jnp.ones((3, 256)), matmul_gpu.prepare(weight('int4 by 128')))


def test_an_older_jax_is_named(monkeypatch):
  monkeypatch.setattr(jax, '__version__', '0.10.2')
  assert 'this is jax 0.10.2' in matmul_gpu.unsupported(inputs(3), weight('int4 by 128'))
  with pytest.raises(NotImplementedError, match='need 0.11 or newer'):
    matmul_gpu.matmul(inputs(3), matmul_gpu.prepare(weight('int4 by 128')))


def test_only_hopper_runs_them():
  device = lambda capability: types.SimpleNamespace(device_kind='NVIDIA', compute_capability=capability)
  assert pipeline_gpu.needs_hopper(device('9.0')) is None
  assert 'compute capability 8.0' in pipeline_gpu.needs_hopper(device('8.0'))
  assert 'compute capability None' in pipeline_gpu.needs_hopper(jax.devices('cpu')[0])


def test_wrong_tiles_and_layouts_raise(monkeypatch):
  monkeypatch.setattr(pipeline_gpu, 'needs_jax', lambda: None)
  p, x = matmul_gpu.prepare(weight('int4 by 128')), inputs(8)
  with pytest.raises(ValueError, match='rows are multiples of 8'):
    matmul_gpu.matmul(x, p, tiles_gpu.Tiles(12))
  with pytest.raises(ValueError, match='do not tile a weight padded to 256 inputs and 128 outputs'):
    matmul_gpu.matmul(x, p, tiles_gpu.Tiles(8, 128))
  with pytest.raises(ValueError, match='fewer steps than stages'):
    matmul_gpu.matmul(x, p, tiles_gpu.Tiles(8, stages=3))
  with pytest.raises(ValueError, match="this kernel reads 'gpu-sm90/1'"):
    matmul_gpu.matmul(x, type(p)(p.arrays, p.spec, p.shape, 'tpu/1'))
