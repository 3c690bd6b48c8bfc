"""What every grid promises. A new Spec in specs.py joins by itself; a new format adds a line to FORMATS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, specs
from qat.core.blocks import Flat
from qat.core.qarray import Min, Spec, Zero

FORMATS = dict(
    **{str(f): f for b in range(1, 9) for f in (formats.Int(b), formats.Int(b, signed=False))},
    **{str(f): f for f in (formats.Int(b, narrow=True) for b in range(2, 9))},
    **{str(f): f for f in (
        formats.TERNARY, formats.BINARY, formats.FP16, formats.BF16, formats.FP8_E4M3, formats.FP8_E5M2,
        formats.FP6_E2M3, formats.FP6_E3M2, formats.FP4_E2M1, formats.FP4_E3M0, formats.Float(2, 2),
        codebooks.NF4, codebooks.NF3, codebooks.NF2, codebooks.FP4_BNB, codebooks.IQ4_NL,
        codebooks.DYNAMIC8, codebooks.DYNAMIC8_UNSIGNED, codebooks.power_of_two(4))})
NAMED = {n: s for n, s in vars(specs).items() if isinstance(s, Spec) and s.block is not None}
GRIDS = dict(
    **{f'{n}_token': Spec(f, (None,)) for n, f in FORMATS.items()},
    **NAMED,
    **{f'{n}_kernel': specs.kernel(s) for n, s in NAMED.items()},
    int8_tensor=specs.integer(8, (...,)), int8_channel=specs.integer(8, (None, 1), narrow=True),
    int4_group=specs.integer(4, (64, 1)), int3_tile=specs.integer(3, (64, 32)), int4_columns=specs.integer(4, (..., 1)),
    uint8_affine=specs.affine(8, (...,)), uint4_affine=specs.affine(4, (64, 1)), uint2_affine=specs.affine(2, (None,)),
    hqq=Spec(formats.UINT4, (64, 1), zero=Zero()), int8_affine=Spec(formats.INT8, (None,), zero=Zero(formats.INT8)),
    min_f32=Spec(formats.UINT4, (32,), zero=Min()), flat_short=Spec(codebooks.NF4, Flat(48)),
    bf16_scale=Spec(formats.INT4, (32,), Spec(formats.BF16, None)))
X = np.random.default_rng(0).standard_normal((3, 256, 256)).astype(np.float32)
X[0, :32] = 0                                                            # Empty blocks,
X[1, :, :32] = 1.5                                                       # constant ones,
X[1, :, 32:64] *= 1e-20                                                  # tiny,
X[2, 32:64] *= 1e12                                                      # huge,
X[:, 64:96] = X[:, 64:96].round(1)                                       # full of ties,
X[2, :, :32] = np.abs(X[2, :, :32])                                      # and of one sign.


@pytest.fixture(params=GRIDS.values(), ids=GRIDS)
def spec(request):
  return request.param


def same(a, b):
  """Bit for bit, of trees: NaNs and the signs of zeros as well."""
  leaves, structure = jax.tree.flatten(a)
  others, other = jax.tree.flatten(b)
  return structure == other and all(
      x.shape == y.shape and x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
      for x, y in zip(leaves, others))


def test_one_grid_however_it_is_computed(spec):
  """encode in jit, vmap and scan gives the same bits, decodes to `fake`'s in f32 and bf16, again and again."""

  def run(x):
    q = qarray.encode(x[0], spec)
    half = x[0].astype(jnp.bfloat16)
    q_half = qarray.encode(half, spec)
    vmapped = jax.vmap(lambda x: qarray.encode(x, spec))(x)
    _, scanned = jax.lax.scan(lambda _, x: (None, qarray.encode(x, spec)), None, x)
    return dict(
        q=q, value=qarray.decode(q), fake=qarray.fake(x[0], spec),
        again=qarray.encode(qarray.decode(q), spec, q.scale, q.zero),
        half=qarray.decode(q_half, jnp.bfloat16), fake_half=qarray.fake(half, spec),
        vmapped=vmapped, scanned=scanned, vmapped_value=jax.vmap(qarray.decode)(vmapped))

  out = jax.jit(run)(X)
  assert np.isfinite(out['value']).all() and out['value'].dtype == jnp.float32
  # As numbers: integer codes have no -0.
  assert (out['fake'] == out['value']).all()
  assert (out['fake_half'] == out['half']).all() and out['half'].dtype == jnp.bfloat16
  assert same(out['again'].codes, out['q'].codes)
  assert same(out['scanned'], out['vmapped'])
  assert same(jax.tree.map(lambda a: a[0], out['vmapped']), out['q'])
  assert same(out['vmapped_value'][0], out['value'])
  assert out['q'].codes.shape == X[0].shape and out['q'].codes.dtype == spec.format.storage
  levels = set(spec.format.levels())
  assert set(np.unique(spec.format.decode(out['q'].codes)).tolist()) <= levels


# One program an operation is slow to compile: a kernel's grid differs by its axes only, integers by their ends.
EAGER = {n: s for n, s in GRIDS.items() if not n.endswith('_kernel') and 'INT' not in n}


@pytest.mark.parametrize('spec', EAGER.values(), ids=EAGER)
def test_eager_is_jit(spec):
  x = X[2]
  eager = qarray.encode(x, spec)
  assert same(eager, jax.jit(qarray.encode, static_argnums=1)(x, spec))
  frozen = jax.jit(qarray.encode, static_argnums=1)(x, spec, eager.scale, eager.zero)    # XLA sees no quotient.
  assert same(frozen, eager)
  assert same(qarray.decode(eager), jax.jit(qarray.decode)(eager))
  assert same(qarray.fake(x, spec), jax.jit(qarray.fake, static_argnums=1)(x, spec))
