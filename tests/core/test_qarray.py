import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qat.core import formats, qarray, specs
from qat.core.blocks import Flat
from qat.core.qarray import Min, Spec, Zero

X = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
STORED = dict(int4=specs.integer(4, (32,)), int8=specs.integer(8, (None,)), fp8=specs.MXFP8, fp6=specs.MXFP6,
              fp4=specs.NVFP4, nested=specs.NF4_DQ, kquant=specs.Q4_K, affine=specs.affine(4, (128,)))


@pytest.fixture(params=STORED.values(), ids=STORED)
def q(request):
  return jax.jit(qarray.encode, static_argnums=1)(X, request.param)


def test_worked_by_hand():
  x = jnp.array([[1.0, -7.0, 2.5, 3.5], [0.0, 0.0, 0.0, 0.0]])
  q = qarray.encode(x, Spec(formats.INT4, (None,)))
  np.testing.assert_array_equal(q.scale, [[1.0], [0.0]])
  np.testing.assert_array_equal(q.codes.astype(jnp.int8), [[1, -7, 2, 4], [0, 0, 0, 0]])     # Ties to even.
  q = qarray.encode(jnp.array([[-1.0, 0.0, 2.0]]), specs.affine(2, (None,)))                 # (2 - -1) / 3
  np.testing.assert_array_equal(q.codes, [[0, 1, 3]])
  assert q.scale == 1 and qarray.decode(q.zero) == 1


def test_zeros_of_gptq_and_minimums_of_gguf():
  """x = (codes - zero) * scale, and x = codes * scale + min."""
  x = jnp.array([[-0.5, 0.25, 1.0]])
  integer = qarray.encode(x, specs.affine(4, (None,)))
  np.testing.assert_allclose(qarray.decode(integer),
                             (integer.codes.astype(jnp.float32) - qarray.decode(integer.zero)) * integer.scale)
  minimum = qarray.encode(x, Spec(formats.UINT4, (None,), zero=Min()))
  assert minimum.zero == -0.5 and qarray.decode(minimum)[0, 0] == -0.5
  floating = qarray.encode(x, Spec(formats.UINT4, (None,), zero=Zero()))                     # HQQ
  assert abs(floating.zero - 5) < 1e-5


def test_zero_is_exact_under_an_integer_zero():
  x = jax.random.uniform(jax.random.key(0), (64, 32), minval=0.5, maxval=3).at[:, 7].set(0)
  assert (qarray.fake(x, specs.affine(4, (32,)))[:, 7] == 0).all()
  all_positive = x + 1                                                  # The range is widened to 0.
  assert (qarray.decode(qarray.encode(all_positive, specs.affine(4, (32,))).zero) == 0).all()


def test_survives_tree_jit_vmap_scan_and_grad(q):
  want = qarray.decode(q)
  copy = jax.tree.unflatten(jax.tree.structure(q), jax.tree.leaves(q))
  np.testing.assert_array_equal(qarray.decode(copy), want)
  np.testing.assert_array_equal(jax.jit(qarray.decode)(jax.jit(lambda q: q)(q)), want)
  stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
  np.testing.assert_array_equal(jax.vmap(qarray.decode)(stacked), jnp.stack([want, want]))
  _, scanned = jax.lax.scan(lambda carry, q: (carry, qarray.decode(q)), 0, stacked)
  np.testing.assert_array_equal(scanned, jnp.stack([want, want]))
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(x * qarray.decode(q))))(jnp.ones_like(want))  # Closed over.
  np.testing.assert_array_equal(gradient, want)


def test_survives_orbax(q, tmp_path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'q', {'kernel': q})
    checkpointer.wait_until_finished()
    back = checkpointer.restore(tmp_path / 'q', jax.tree.map(jnp.zeros_like, {'kernel': q}))['kernel']
  assert isinstance(back, qarray.QArray) and back.spec == q.spec
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
    assert a.dtype == b.dtype and (a == b).all()


def test_sharded_over_two_devices_gives_the_same_bits():
  """In a process of its own: the number of devices is fixed when jax starts."""
  program = textwrap.dedent('''
      import jax, numpy as np
      from jax.sharding import NamedSharding, PartitionSpec as P
      from qat.core import qarray, specs
      x = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
      mesh = jax.make_mesh((2,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
      encode = jax.jit(qarray.encode, static_argnums=1)
      for spec in (specs.integer(4, (32,)), specs.NVFP4, specs.NF4_DQ, specs.Q4_K, specs.affine(8, (...,))):
        want = encode(x, spec)
        got = encode(jax.device_put(x, NamedSharding(mesh, P('d'))), spec)
        assert len(got.codes.devices()) == 2, spec
        values = jax.jit(qarray.decode)(got), jax.jit(qarray.decode)(want)
        for a, b in zip(jax.tree.leaves((got, values[0])), jax.tree.leaves((want, values[1])), strict=True):
          assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), spec
      print('same')
      ''')
  environment = os.environ | dict(JAX_NUM_CPU_DEVICES='2', JAX_PLATFORMS='cpu')
  run = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True)
  assert run.stdout == 'same\n', run.stderr


# Bits per weight: the code's, and its share of the scales (and zeros).
BITS = dict(MXFP8=8.25, MXFP6=6.25, MXFP4=4.25, MXINT8=8.25, NF4=4.5, Q4_0=4.5, Q4_1=5.0, Q5_0=5.5, Q5_1=6.0,
            Q8_0=8.5, IQ4_NL=4.5, Q2_K=2.625, Q3_K=3.4375, Q4_K=4.5, Q5_K=5.5, Q6_K=6.5625)


@pytest.mark.parametrize('name', BITS)
def test_bits_per_weight_are_those_of_the_standard(name):
  assert jax.eval_shape(lambda: qarray.encode(X, getattr(specs, name))).nbits / X.size == BITS[name]


def test_bits_of_shared_and_ternary_grids():
  x = jnp.zeros((1024, 4096))
  bits = lambda spec: jax.eval_shape(lambda: qarray.encode(x, spec)).nbits / x.size
  assert bits(specs.NVFP4) == 4.5 + 32 / x.size
  assert bits(specs.affine(4, (128,))) == 4 + (32 + 4) / 128
  assert bits(Spec(formats.TERNARY, (...,))) == pytest.approx(1.6 + 32 / x.size)


def test_flat_runs_read_row_after_row_and_may_end_short():
  spec = Spec(formats.INT8, Flat(6))
  x = jnp.arange(1.0, 16).reshape(3, 5)
  q = qarray.encode(x, spec)
  np.testing.assert_allclose(q.scale * 127, [6, 12, 15], rtol=1e-6)
  columns = Spec(formats.INT8, Flat(6, columns=True))
  np.testing.assert_array_equal(qarray.encode(x.T, columns).scale, q.scale)
  np.testing.assert_array_equal(qarray.decode(qarray.encode(x.T, columns)), qarray.decode(q).T)


@pytest.mark.parametrize('name', ['MXFP4', 'NVFP4', 'NF4', 'NF4_DQ', 'Q4_0', 'Q4_K'])
def test_a_kernels_grid_is_the_rows_grid_transposed(name):
  spec = getattr(specs, name)
  rows, columns = jax.jit(lambda x: (qarray.fake(x, spec), qarray.fake(x.T, specs.kernel(spec)).T))(X)
  np.testing.assert_array_equal(rows, columns)


def test_a_block_that_does_not_tile_says_which_axis():
  with pytest.raises(ValueError, match=r'axis 1 has 100 elements, not a multiple of 32. Pad the axis, or'):
    qarray.encode(jnp.zeros((4, 100)), specs.MXFP4)
  with pytest.raises(ValueError, match=r'tiles 2 trailing axes: the array of shape \(8,\) has 1'):
    qarray.encode(jnp.zeros(8), Spec(formats.INT4, (None, 1)))
  with pytest.raises(TypeError, match=r'Spec.block 32 is a int: a block is a tuple'):
    Spec(formats.INT4, 32)
  with pytest.raises(ValueError, match='whose zero is None. Give both, or neither'):
    qarray.encode(jnp.zeros((4, 32)), specs.Q4_0, jnp.ones((4, 1)), jnp.ones((4, 1)))


@pytest.mark.parametrize('fields, message', [
    ((formats.INT4, (32,), 'f16'), "Spec.scale 'f16' is a str. Give None"),
    ((formats.INT4, (0,)), 'Spec.block .*an entry is a size of 1 or more'),
    ((formats.INT4, (3.5,)), 'Spec.block .*an entry is a size of 1 or more'),
    ((formats.INT4, (32, ...)), 'Spec.block .*the first may be'),
])
def test_a_spec_checks_its_fields(fields, message):
  with pytest.raises((TypeError, ValueError), match=message):
    Spec(*fields)


@pytest.mark.parametrize('x, spec, message', [
    (X, formats.INT4, 'The grid .* is a Int, and no Spec. Give a qat.Spec'),
    (X, 'MXFP4', 'The grid .* is a str'),
    ([[1.0] * 32], specs.MXFP4, 'is a list, and no array: give a jax.Array'),
    (qarray.encode(X, specs.MXFP4), specs.MXFP4, 'is a QArray, which has codes already: qat.decode it first'),
    (X.astype(complex), specs.MXFP4, 'whose numbers are real. Encode x.real'),
])
def test_what_is_no_array_or_no_spec_is_refused(x, spec, message):
  for place in (qarray.encode, qarray.fake):
    with pytest.raises(TypeError):
      place(x, spec)
  with pytest.raises(TypeError, match=message):  # Without the types that the tests' hook checks first.
    qarray._check(x, spec)


def test_quotients_are_ieee_754s_in_any_program():
  """XLA would turn x / 15 into x * (1 / 15), 1 / (x / 15) into 15 / x, and (x / 7) / 3 into x / 21."""
  x = np.random.default_rng(0).uniform(0.5, 4, 4096).astype(np.float32)
  fifteenth = x / np.float32(15)
  got = jax.jit(lambda x: (qarray.divide(x, 15.0), qarray.reciprocal(qarray.divide(x, 15.0)),
                           qarray.divide(qarray.divide(x, 7.0), 3.0)))(x)
  for a, want in zip(got, (fifteenth, 1 / fifteenth, x / np.float32(7) / np.float32(3)), strict=True):
    np.testing.assert_array_equal(a, want)
