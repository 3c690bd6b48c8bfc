"""The CPU's products: every grid, number of rows and level of instructions against float64; and how they are built."""

import concurrent.futures
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, specs
from qat.kernels import integer, matmul_cpu
from qat.kernels.cpu import encoding, library

LEVELS = library.load()
pytestmark = pytest.mark.skipif(isinstance(LEVELS, library.Unbuilt), reason=str(LEVELS))
Spec = qarray.Spec
# name -> (grid, [k, n] of the weight).
GRIDS = {
    'int4, groups of 32': (specs.integer(4, (32, 1)), (128, 33)),
    'int4, an output': (specs.integer(4, (None, 1)), (512, 20)),
    'int4, an odd number of inputs': (specs.integer(4, (None, 1)), (67, 16)),
    'int4, groups of 5': (specs.integer(4, (5, 1)), (65, 7)),
    'int4, the matrix': (specs.integer(4, (None, None)), (64, 35)),
    'int4, square tiles': (specs.integer(4, (32, 4)), (64, 36)),
    'int4 without scales': (Spec(formats.INT4, None), (64, 5)),
    'affine 4': (specs.affine(4, (64, 1)), (128, 33)),
    'affine 8': (specs.affine(8, (None, 1)), (256, 17)),
    'HQQ': (Spec(formats.UINT4, (64, 1), zero=qarray.Zero()), (128, 9)),
    'int8': (specs.integer(8, (None, 1)), (300, 33)),
    'uint8': (specs.integer(8, (64, 1), signed=False), (128, 5)),
    'int5': (specs.integer(5, (32, 1)), (64, 17)),
    'int3': (specs.integer(3, (32, 1)), (64, 17)),
    'int2': (specs.integer(2, (64, 1)), (128, 33)),
    'int2, groups of 8': (specs.integer(2, (8, 1)), (64, 17)),
    'ternary': (Spec(formats.TERNARY, (None, 1)), (128, 33)),
    'binary': (Spec(formats.BINARY, (64, 1)), (128, 33)),
    'NF4': (specs.kernel(specs.NF4), (128, 33)),
    'NF4, quantized scales': (specs.kernel(specs.NF4_DQ), (512, 33)),
    'NF3': (Spec(codebooks.NF3, (64, 1)), (128, 17)),
    'MXFP4': (specs.kernel(specs.MXFP4), (64, 33)),
    'NVFP4': (specs.kernel(specs.NVFP4), (64, 33)),
    'MXFP6': (specs.kernel(specs.MXFP6), (64, 33)),
    'MXFP6 E3M2': (specs.kernel(specs.MXFP6_E3M2), (64, 33)),
    'MXFP8': (specs.kernel(specs.MXFP8), (64, 33)),
    'MXFP8 E5M2': (specs.kernel(specs.MXFP8_E5M2), (64, 33)),
    'Q2_K': (specs.kernel(specs.Q2_K), (256, 17)),
    'Q4_K': (specs.kernel(specs.Q4_K), (256, 17)),
    'Q6_K': (specs.kernel(specs.Q6_K), (256, 17)),
}
ROWS = (1, 2, 3, 4, 7, 33)
# (the grid of x, the grid of w).
INTEGERS = {
    'int8, int8': (specs.integer(8, specs.TOKEN), specs.integer(8, specs.CHANNEL)),
    'int8, int4': (specs.integer(8, specs.TOKEN), specs.integer(4, specs.CHANNEL)),
    'affine, int2': (specs.affine(8, specs.TOKEN), specs.integer(2, specs.CHANNEL)),
    'uint8, ternary': (specs.integer(8, specs.TENSOR, signed=False), Spec(formats.TERNARY, (None, None))),
    'affine, affine 8': (specs.affine(8, specs.TOKEN), specs.affine(8, specs.CHANNEL)),
    'int8, affine 4': (specs.integer(8, specs.TOKEN), specs.affine(4, specs.CHANNEL)),
    'int4, binary': (specs.integer(4, specs.TOKEN), Spec(formats.BINARY, specs.CHANNEL)),
}


def numbers(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def weights():
  """grid -> (QArray, Prepared), made in one program."""
  encode = lambda w: {name: qarray.encode(w[name], spec) for name, (spec, _) in GRIDS.items()}
  make = lambda w: {name: (q, matmul_cpu.prepare(q)) for name, q in encode(w).items()}
  return jax.jit(make)({name: numbers(shape) + 0.1 for name, (_, shape) in GRIDS.items()})


@functools.cache
def products(level):
  """(grid, rows) -> x @ w, in one program."""
  prepared = {name: p for name, (_, p) in weights().items()}
  inputs = {(name, m): numbers((m, GRIDS[name][1][0]), m) for name in GRIDS for m in ROWS}
  run = lambda x, p: {key: matmul_cpu.matmul(v, p[key[0]], level) for key, v in x.items()}
  return inputs, jax.jit(run)(inputs, prepared)


@pytest.mark.parametrize('level', library.LEVELS)
@pytest.mark.parametrize('grid', GRIDS)
def test_product_is_that_of_the_numbers(grid, level):
  if level not in LEVELS:
    pytest.skip(f'this CPU has no {level}')
  w = np.asarray(qarray.decode(weights()[grid][0]), np.float64)
  inputs, ys = products(level)
  for m in ROWS:
    x = np.asarray(inputs[grid, m], np.float64)
    # Sums of k rounded products: k eps, of which errors of random signs take a small part.
    bound = 4e-7 * (np.abs(x) @ np.abs(w)) + 1e-6 * np.abs(x).sum(1, keepdims=True) * np.abs(w).max()
    assert (np.abs(np.asarray(ys[grid, m], np.float64) - x @ w) <= bound).all(), m


@pytest.mark.parametrize('grid', GRIDS)
def test_prepared_weight_decodes(grid):
  q, p = weights()[grid]
  w, ours = np.asarray(qarray.decode(q)), np.asarray(matmul_cpu.decode(p))
  np.testing.assert_allclose(ours, w, rtol=0, atol=0 if q.zero is None else 1e-6 * np.abs(w).max())
  assert p.target == 'cpu' and p.shape == q.shape


@pytest.mark.parametrize('level', LEVELS)
def test_sums_of_codes_are_those_of_the_definition(level):
  x = {name: qarray.encode(numbers((m, 100), m) + 0.3, spec) for m, (name, (spec, _)) in
       zip((1, 2, 3, 5, 9, 20, 33), INTEGERS.items())}
  w = {name: qarray.encode(numbers((100, 37)), spec) for name, (_, spec) in INTEGERS.items()}
  ours = jax.jit(lambda x, w: {n: matmul_cpu.matmul(x[n], matmul_cpu.prepare(w[n]), level) for n in x})(x, w)
  definition = jax.jit(lambda x, w: {n: integer.matmul(x[n], w[n]) for n in x})(x, w)
  for name in INTEGERS:
    np.testing.assert_array_equal(ours[name], definition[name], name)


@pytest.mark.parametrize('level', LEVELS)
def test_the_largest_codes_are_summed_exactly(level):
  k, ones = 4096, jnp.ones((1, 1))
  x = qarray.QArray(jnp.full((2, k), -128, jnp.int8), ones, None, specs.integer(8, specs.TENSOR))
  w = qarray.QArray(jnp.full((k, 1), -128, jnp.int8), ones, None, specs.integer(8, specs.CHANNEL))
  np.testing.assert_array_equal(matmul_cpu.matmul(x, matmul_cpu.prepare(w), level), np.full((2, 1), 128 * 128 * k))


def test_every_float8_has_its_value():
  for dtype, exponent in ((jnp.float8_e4m3fn, 4), (jnp.float8_e5m2, 5)):
    values = np.arange(256).astype(np.uint8).view(dtype).astype(np.float64)
    factors = np.asarray(encoding._factors(exponent)).reshape(3, 16)
    upper, lower = np.arange(256) >> 4, np.arange(256) & 15
    ours = factors[0][upper] * np.where(upper % 8 == 0, factors[1][lower], factors[2][lower])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(ours[finite], values[finite])


def test_what_is_not_finite_stays_so():
  p = weights()['int4, groups of 32'][1]
  x = numbers((20, 128))
  x[3, 5], x[17, 100] = np.nan, np.inf
  for rows in (4, 20):                                                       # Both kinds of loops.
    y = np.asarray(matmul_cpu.matmul(jnp.asarray(x[:rows]), p))
    bad = ~np.isfinite(x[:rows]).all(1)
    assert not np.isfinite(y[bad]).any() and np.isfinite(y[~bad]).all()
  codes = jnp.asarray(numbers((32, 3))).at[7, 1].set(jnp.nan).astype(jnp.float8_e4m3fn)
  q = qarray.QArray(codes, jnp.ones((1, 3)), None, specs.kernel(Spec(formats.FP8_E4M3, (32,))))
  y = matmul_cpu.matmul(jnp.ones((1, 32)), matmul_cpu.prepare(q))
  np.testing.assert_array_equal(np.isnan(y), [[False, True, False]])


def test_bfloat16_is_multiplied_and_returned():
  q, p = weights()['NF4']
  x = jnp.asarray(numbers((2, 3, 128)), jnp.bfloat16)
  y = matmul_cpu.matmul(x, p)
  assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 33)
  reference = np.asarray(x, np.float64) @ np.asarray(qarray.decode(q), np.float64)
  np.testing.assert_allclose(np.asarray(y, np.float64), reference, rtol=2**-8, atol=1e-4)
  assert matmul_cpu.matmul(x[0, 0], p).shape == (33,)


def test_transformations():
  q, p = weights()['affine 4']
  x = jnp.asarray(numbers((2, 3, 128)))
  w = np.asarray(qarray.decode(q), np.float64)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-4)
  near(jax.jit(jax.vmap(matmul_cpu.matmul, (0, None)))(x, p), np.asarray(x) @ w)
  near(jax.jit(jax.vmap(jax.vmap(matmul_cpu.matmul, (0, None)), (0, None)))(x, p), np.asarray(x) @ w)
  stack = jax.tree.map(lambda a: jnp.stack([a, 2 * a if a.dtype == jnp.float32 else a]), p)
  double = np.stack([np.asarray(x[0]) @ w, np.asarray(x[1]) @ (2 * w)])
  near(jax.jit(jax.vmap(matmul_cpu.matmul))(x, stack), double)
  each = lambda x: np.stack([np.asarray(x) @ w * i for i in (1, 2)])
  near(jax.jit(jax.vmap(matmul_cpu.matmul, (None, 0)))(x[0], stack), each(x[0]))
  step = lambda carry, layer: (carry, matmul_cpu.matmul(carry, layer))
  near(jax.jit(lambda x, s: jax.lax.scan(step, x, s)[1])(x[0], stack), each(x[0]))
  nested = jax.vmap(jax.vmap(matmul_cpu.matmul, (None, 0)), (0, None))       # The weights' batch is the second.
  near(jax.jit(nested)(x, stack), np.stack([each(v) for v in x]))
  codes = jax.vmap(lambda x: matmul_cpu.matmul(qarray.encode(x, specs.integer(8, specs.TOKEN)), weights()['int8'][1]))
  x = jnp.asarray(numbers((2, 3, 300)))
  one = qarray.encode(x[1], specs.integer(8, specs.TOKEN))
  np.testing.assert_array_equal(jax.jit(codes)(x)[1], integer.matmul(one, weights()['int8'][0]))


def test_many_threads_call_at_once():
  q = qarray.encode(jnp.asarray(numbers((256, 2048))), specs.integer(4, (64, 1)))
  p, f = matmul_cpu.prepare(q), jax.jit(matmul_cpu.matmul)
  xs = [jnp.asarray(numbers((5, 256), i)) for i in range(8)]
  alone = [np.asarray(f(x, p)) for x in xs]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    together = list(pool.map(lambda x: [np.asarray(f(x, p)) for _ in range(20)], xs))
  for one, many in zip(alone, together):
    for y in many:
      np.testing.assert_array_equal(y, one)


def test_empty_arrays():
  p = weights()['NF4'][1]
  assert matmul_cpu.matmul(jnp.zeros((0, 128)), p).shape == (0, 33)


def test_unsupported_says_why():
  q, p = weights()['int4, groups of 32']
  x = jax.ShapeDtypeStruct((2, 128), jnp.float32)
  assert matmul_cpu.unsupported(x, q) is None and matmul_cpu.unsupported(x, p) is None
  assert matmul_cpu.unsupported(x, jax.eval_shape(lambda: q)) is None
  assert 'x is float32 or bfloat16, not int32' in matmul_cpu.unsupported(jax.ShapeDtypeStruct((2, 128), jnp.int32), q)
  assert 'the shapes are (2, 64) and (128, 33)' in matmul_cpu.unsupported(jax.ShapeDtypeStruct((2, 64), jnp.float32), q)
  many = qarray.encode(jnp.ones((64, 2)), Spec(codebooks.DYNAMIC8, (64, 1)))
  assert 'has 256 values' in matmul_cpu.unsupported(jax.ShapeDtypeStruct((2, 64), jnp.float32), many)
  across = qarray.encode(jnp.ones((64, 128)), specs.NF4)
  assert 'runs along the outputs' in matmul_cpu.unsupported(jax.ShapeDtypeStruct((2, 64), jnp.float32), across)
  codes = qarray.encode(jnp.ones((2, 128)), specs.integer(8, specs.TOKEN))
  assert 'do not change along the inputs' in matmul_cpu.unsupported(codes, p)
  for call in (lambda: matmul_cpu.prepare(many), lambda: matmul_cpu.prepare(jax.tree.map(lambda a: a[None], q))):
    with pytest.raises(ValueError, match='which it cannot be'):
      call()
  with pytest.raises(NotImplementedError, match='the shapes are'):
    matmul_cpu.matmul(jnp.ones((2, 64)), p)
  with pytest.raises(NotImplementedError, match="level='avx1024'"):
    matmul_cpu.matmul(jnp.ones((2, 128)), p, 'avx1024')


def run_in_a_process(code, **variables):
  keep = {k: v for k, v in os.environ.items() if k not in ('CXX', 'QAT_CACHE')}
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=keep | variables,
                          cwd=pathlib.Path(__file__).parents[2])
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_a_second_process_builds_nothing(tmp_path):
  variables = {} if 'QAT_CACHE' not in os.environ else {'QAT_CACHE': os.environ['QAT_CACHE']}
  code = ('import subprocess; from qat.kernels.cpu import library; run = subprocess.run; ran = []\n'
          'subprocess.run = lambda command, **k: (ran.append(command), run(command, **k))[1]\n'
          'print(library.load(), ran)')
  out = run_in_a_process(code, **variables)
  assert str(LEVELS) in out and '--version' in out and '-shared' not in out


def test_without_a_compiler_it_says_so(tmp_path):
  code = 'from qat.kernels.cpu import library; print(repr(library.load()))'
  out = run_in_a_process(code, PATH=str(tmp_path), QAT_CACHE=str(tmp_path))
  assert 'neither g++ nor clang++ nor c++ is on PATH' in out
  broken = tmp_path / 'c++'
  broken.write_text(f'#!{sys.executable}\nimport sys\nif "-shared" in sys.argv: sys.exit("no such flag")\n')
  broken.chmod(0o755)
  out = run_in_a_process(code, PATH=str(tmp_path), QAT_CACHE=str(tmp_path))
  assert 'do not compile' in out and 'no such flag' in out
  assert not list((tmp_path / 'kernels').iterdir())                          # Nothing half-made is left.
