"""Every implementation equals x @ decode(q) in float64, within what its dtypes round; and says what it cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, specs
from qat.kernels import groups, matmul, matmul_tpu, matmul_xla

K, N = 256, 200
WEIGHTS = {
    'int4 by 128': specs.integer(4, (128, 1)), 'int4 by 32': specs.integer(4, (32, 1)),
    'int4 an output': specs.integer(4, specs.CHANNEL), 'int8 a tensor': specs.integer(8, specs.TENSOR),
    'int5 by 128': specs.integer(5, (128, 1)), 'int3 by 64': specs.integer(3, (64, 1)),
    'int2 by 32': specs.integer(2, (32, 1)), 'int2 by 128': specs.integer(2, (128, 1)),
    'uint2 with zeros': specs.affine(2, (128, 1)), 'uint3 with zeros': specs.affine(3, (64, 1)),
    'Q2_K': specs.kernel(specs.Q2_K),
    'uint4 with zeros': specs.affine(4, (128, 1)), 'uint8 with zeros': specs.affine(8, specs.CHANNEL),
    'Q4_K': specs.kernel(specs.Q4_K), 'NF4': specs.kernel(specs.NF4), 'NF4 with double quantization':
    specs.kernel(specs.NF4_DQ), 'fp8': qarray.Spec(formats.FP8_E4M3, specs.CHANNEL), 'MXFP4': specs.kernel(specs.MXFP4),
    'NVFP4': specs.kernel(specs.NVFP4), 'ternary': qarray.Spec(formats.TERNARY, specs.CHANNEL),
    'binary': qarray.Spec(formats.BINARY, specs.CHANNEL), 'NF3 by 128': qarray.Spec(codebooks.NF3, (128, 1)),
    'tiles': specs.integer(4, (128, 100))}
IMPLEMENTATIONS = {'decoded': matmul_xla.decoded, 'grouped': matmul_xla.grouped, 'sliced': matmul_xla.sliced,
                   'tpu': functools.partial(matmul.matmul, implementation=matmul.Kernel('tpu', interpret=True))}
CODES = {'int8': specs.integer(8, specs.TOKEN), 'int4': specs.integer(4, specs.TOKEN),
         'fp8': qarray.Spec(formats.FP8_E4M3, specs.TOKEN), 'uint8': specs.integer(8, specs.TENSOR, signed=False)}


@functools.cache
def weight(name):
  w = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32) + 0.1
  return jax.jit(lambda w: qarray.encode(w, WEIGHTS[name]))(w)


def inputs(rows, dtype=jnp.bfloat16):
  return jnp.asarray(np.random.default_rng(rows).standard_normal((rows, K)), dtype)


def wide(a):
  return np.asarray(a, np.float64)


def assert_product(y, x, q):
  """Each operand and the result may be rounded to bfloat16 once: 2^-9 of what is added up, each."""
  x, w = wide(x), wide(qarray.decode(q))
  np.testing.assert_allclose(wide(y), x @ w, rtol=0, atol=3 * 2.0**-9 * (abs(x) @ abs(w)).max())
  assert abs(wide(y) - x @ w).mean() < 2.0**-9 * (abs(x) @ abs(w)).mean()


@pytest.mark.parametrize('name', WEIGHTS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_equals_the_product_in_float64(implementation, name):
  q = weight(name)
  run = jax.jit(IMPLEMENTATIONS[implementation])
  for rows in (3, 70):  # Scales after the sums of groups, and in the weight.
    y = run(inputs(rows), q)
    assert y.dtype == jnp.bfloat16
    assert_product(y, inputs(rows), q)


@pytest.mark.parametrize('name, slices', [('int4 by 128', 8), ('fp8', 8), ('int4 by 32', 8), ('Q4_K', 8)])
def test_slices_are_of_whole_groups_or_within_one(name, slices, monkeypatch):
  monkeypatch.setattr(matmul_xla, 'SLICE_NUMBERS', 32 * N)
  q = weight(name)
  assert matmul_xla.slices(groups.of(q)) == slices
  assert_product(jax.jit(matmul_xla.sliced)(inputs(9), q), inputs(9), q)


@pytest.mark.parametrize('name, rows, form', [
    ('int8 a tensor', 3, 'grouped'), ('int4 by 32', 70, 'sliced'), ('NF4', 3, 'sliced'), ('tiles', 257, 'decoded')])
def test_gpus_decode_no_whole_weight_for_few_rows(name, rows, form):
  assert matmul_xla.form(inputs(rows), weight(name)).__name__ == form


@pytest.mark.parametrize('name', ['int4 by 128', 'NF4', 'Q4_K'])
def test_float32_is_exact_to_its_own_rounding(name):
  q, x = weight(name), inputs(5, jnp.float32)
  for f in (matmul_xla.decoded, matmul_xla.grouped, matmul_xla.sliced):
    np.testing.assert_allclose(wide(jax.jit(f)(x, q)), wide(x) @ wide(qarray.decode(q)), rtol=0, atol=1e-4)


@pytest.mark.parametrize('w', ['int4 by 128', 'int2 by 128', 'uint2 with zeros', 'int8 a tensor', 'uint4 with zeros',
                               'uint8 with zeros', 'Q4_K', 'fp8'])
@pytest.mark.parametrize('x', CODES)
def test_products_of_codes(x, w):
  """Sums of integers are exact, those of fp8 exact but for float32's rounding."""
  q = weight(w)
  codes = qarray.encode(inputs(5, jnp.float32), CODES[x])
  expected = wide(qarray.decode(codes)) @ wide(qarray.decode(q))
  y = jax.jit(matmul.matmul)(codes, q)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(wide(y), expected, rtol=0, atol=2e-6 * abs(expected).max())
  if matmul.explain(codes, q)['tpu'] is None:
    for held in (q, matmul.prepare(q, 'tpu', CODES[x])):
      y = matmul.matmul(codes, held, implementation=matmul.Kernel('tpu', interpret=True))
      np.testing.assert_allclose(wide(y), expected, rtol=0, atol=2e-6 * abs(expected).max())


def test_which_codes_tpus_multiply():
  runs = {(x, w) for x in CODES for w in WEIGHTS
          if matmul.explain(qarray.encode(inputs(5, jnp.float32), CODES[x]), weight(w))['tpu'] is None}
  assert {('int8', 'int4 by 128'), ('int4', 'uint4 with zeros'), ('fp8', 'fp8')} <= runs
  assert not any(pair in runs for pair in [('uint8', 'int4 by 128'), ('int8', 'NF4'), ('fp8', 'int8 a tensor')])


@pytest.mark.parametrize('implementation', ['xla', 'tpu'])
def test_gradients_are_those_of_the_decoded_weight(implementation):
  named = 'xla' if implementation == 'xla' else matmul.Kernel('tpu', interpret=True)
  q, x = weight('int4 by 128'), inputs(5)
  dy = jnp.asarray(np.random.default_rng(9).standard_normal((5, N)), jnp.bfloat16)
  _, pull = jax.vjp(lambda x: matmul.matmul(x, q, implementation=named), x)
  expected = wide(dy) @ wide(qarray.decode(q)).T
  np.testing.assert_allclose(wide(pull(dy)[0]), expected, rtol=0, atol=2.0**-8 * abs(expected).max())


@pytest.mark.parametrize('implementation', ['xla', 'tpu'])
def test_under_jax_transformations(implementation):
  """vmap over rows and over weights, scan, remat: all give what single calls give."""
  named = 'xla' if implementation == 'xla' else matmul.Kernel('tpu', interpret=True)
  q, x = weight('int4 by 128'), inputs(6).reshape(2, 3, K)
  f = lambda x, q: matmul.matmul(x, q, implementation=named)
  expected = wide(f(x, q))
  same = lambda y: np.testing.assert_allclose(wide(y), expected, rtol=2.0**-7, atol=0.3)
  stack = jax.tree.map(lambda a: jnp.stack([a, a]), q)
  same(jax.jit(jax.vmap(f, in_axes=(0, None)))(x, q))
  same(jax.jit(jax.vmap(f))(x, stack))
  same(jax.jit(lambda x: jax.lax.scan(lambda _, row: (None, f(row, q)), None, x)[1])(x))
  loss = lambda f: jax.jit(jax.grad(lambda x: f(x, q).astype(jnp.float32).sum()))(x)
  np.testing.assert_allclose(wide(loss(jax.checkpoint(f))), wide(loss(f)), rtol=2.0**-7)


def test_stacked_weights_and_experts():
  rng = np.random.default_rng(3)
  w = jnp.asarray(rng.standard_normal((3, 64, 8)), jnp.float32)
  q = qarray.encode(w, specs.integer(4, (32, 1)))
  x = jnp.asarray(rng.standard_normal((3, 5, 64)), jnp.float32)
  np.testing.assert_allclose(matmul.matmul(x, q), wide(x) @ wide(qarray.decode(q)), atol=1e-4)
  sizes = jnp.array([4, 0, 1])
  y = jax.jit(matmul_xla.ragged)(x[0], q, sizes)
  decoded = wide(qarray.decode(q))
  expected = np.concatenate([wide(x[0, :4]) @ decoded[0], wide(x[0, 4:]) @ decoded[2]])
  np.testing.assert_allclose(y, expected, atol=1e-4)


def test_prepared_weights_decode_to_the_same_numbers():
  for name in ('int4 by 128', 'NF4', 'MXFP4', 'uint4 with zeros', 'Q4_K', 'fp8'):
    p = matmul.prepare(weight(name), 'tpu')
    np.testing.assert_allclose(matmul.decode(p), qarray.decode(weight(name)), rtol=1e-6, atol=1e-6)


def test_what_cannot_run_says_why():
  q, x = weight('int4 by 128'), inputs(3)
  with pytest.raises(NotImplementedError, match="implementation='tpu': the default device of this process is of 'cpu'"):
    matmul.matmul(x, q, implementation='tpu')
  with pytest.raises(ValueError, match="implementation 'cuda': kernels are of"):
    matmul.matmul(x, q, implementation='cuda')
  with pytest.raises(NotImplementedError, match='the input is float32; the MXU multiplies bfloat16'):
    matmul.matmul(inputs(3, jnp.float32), q, implementation=matmul.Kernel('tpu', interpret=True))
  rows = qarray.encode(jnp.ones((K, N)), specs.NF4)
  with pytest.raises(NotImplementedError, match='runs along the outputs'):
    matmul.matmul(x, rows, implementation=matmul.Kernel('tpu', interpret=True))
  p = matmul.prepare(q, 'tpu')
  with pytest.raises(ValueError, match="the weight is in layout 'tpu/1'"):
    matmul.matmul(x, p, implementation='xla')
  with pytest.raises(ValueError, match='Transpose one of them'):
    matmul.matmul(x.T, q)
  with pytest.raises(TypeError, match='The weight is a'):
    matmul.matmul(x, jnp.ones((K, N)))
  with pytest.raises(TypeError, match='x is int32'):
    matmul.matmul(jnp.ones((3, K), jnp.int32), q)
  with pytest.raises(ValueError, match="Kernel 'cuda': kernels are of"):
    matmul.Kernel('cuda')
  with pytest.raises(ValueError, match="prepared for 'npu'"):
    matmul.prepare(q, 'npu')


@pytest.mark.parametrize('name, dtype', [
    ('binary', 'int2'), ('ternary', 'int2'), ('int2 by 32', 'int2'), ('uint2 with zeros', 'int2'), ('Q2_K', 'int2'),
    ('int3 by 64', 'int4'), ('uint3 with zeros', 'int4'), ('int4 by 32', 'int4'), ('uint4 with zeros', 'uint4'),
    ('int5 by 128', 'int8'), ('uint8 with zeros', 'int8'), ('NF4', 'uint4')])
def test_tpus_hold_codes_in_the_fewest_bits(name, dtype):
  q, x = weight(name), inputs(3)
  p = matmul.prepare(q, 'tpu')
  assert p.arrays['codes'].dtype == dtype
  np.testing.assert_allclose(matmul.decode(p), qarray.decode(q), atol=1e-6)
  y = jax.jit(functools.partial(matmul.matmul, implementation=matmul.Kernel('tpu', interpret=True)))(x, p)
  assert_product(y, x, q)


def test_a_single_call_reads_codes_as_they_are_stored():
  kernel = matmul.Kernel('tpu', interpret=True)
  program = str(jax.make_jaxpr(kernel)(inputs(3), weight('int2 by 128')))
  assert 'i4[256,200]' in program and 'i2[' not in program and 'i32[256,200]' not in program
  assert 'i2[256,200]' in str(jax.make_jaxpr(kernel)(inputs(3), matmul.prepare(weight('int2 by 128'), 'tpu')))


def test_empty_inputs_are_left_to_xla():
  assert matmul.matmul(jnp.ones((0, K), jnp.bfloat16), weight('int4 by 128')).shape == (0, N)


def test_the_interpreter_of_races_and_bounds_finds_nothing():
  from jax.experimental.pallas import tpu as pltpu
  q = weight('int4 by 128')
  interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  tiles = matmul_tpu.Tiles(rows=16, outputs=128, inputs=256)
  y = matmul.matmul(inputs(20), q, implementation=matmul.Kernel('tpu', tiles, interpret))
  assert_product(y, inputs(20), q)


def test_codebooks_of_more_levels_are_left_to_xla():
  q = jax.eval_shape(lambda w: qarray.encode(w, qarray.Spec(codebooks.normal_float(5), (32, 1))), jnp.ones((K, N)))
  assert 'levels' in matmul.explain(inputs(3), q)['tpu']


def test_tables_are_looked_up_for_whole_runs_of_8_on_tpu():
  q = qarray.encode(jnp.ones((12, 128)), qarray.Spec(codebooks.NF4, (4, 1)))
  assert 'groups of 4 inputs are no multiple of 8' in matmul.explain(jnp.ones((3, 12), jnp.bfloat16), q)['tpu']
