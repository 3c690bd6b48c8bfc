"""bitsandbytes' own functions, on the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, qarray
from qat.core.blocks import Flat
from qat.export import bitsandbytes as ours
from tests.export.test_bitsandbytes import encoded

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings('ignore::FutureWarning'),
              pytest.mark.filterwarnings('ignore::DeprecationWarning')]
W = np.random.default_rng(1).standard_normal((512, 4096)).astype(np.float32)  # [in, out]


@pytest.fixture(scope='module')
def functional():
  return pytest.importorskip('bitsandbytes.functional')


def numbers(parts):
  return parts['.quant_map'][np.stack([parts[''].ravel() >> 4, parts[''].ravel() & 15], -1).ravel()]


def on_every_level(x, code):
  """bitsandbytes' (codes, absmax) of float64 numbers, which its CPU path compares with every level.

  That of float32 looks levels up in a table, and takes a neighbour for some.
  """
  torch = pytest.importorskip('torch')
  return [t.numpy() for t in torch.ops.bitsandbytes.quantize_blockwise(torch.asarray(x).double(), code, 256)]


def quantized(functional, name, size):
  """(parts as we name them, numbers[in, out]) of what bitsandbytes makes of W."""
  torch = pytest.importorskip('torch')
  rows = torch.asarray(np.ascontiguousarray(W.T))
  packed, state = functional.quantize_4bit(
      rows, blocksize=size, quant_type=name[:3], compress_statistics=name.endswith('dq'))
  parts = {'': packed.numpy()} | {'.' + k: v.numpy() for k, v in state.as_dict(packed=True).items()}
  return parts, functional.dequantize_4bit(packed, state).numpy().T


@pytest.mark.parametrize('size', [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize('name', ['nf4', 'fp4'])
def test_codes_and_absmax_are_theirs(functional, name, size):
  theirs, _ = quantized(functional, name, size)
  mine = ours.tensors(encoded(name, W, size))
  assert set(mine) == set(theirs)
  np.testing.assert_array_equal(mine['.absmax'], theirs['.absmax'])
  np.testing.assert_array_equal(numbers(mine), numbers(theirs))           # FP4 has two zeros.
  if name == 'nf4':
    np.testing.assert_array_equal(mine[''], theirs[''])


@pytest.mark.parametrize('size', [64, 512, 4096])
def test_double_quantization_is_theirs(functional, size):
  """The mean that is taken off is a sum, whose last bit depends on its order: codes are compared under theirs."""
  plain, _ = quantized(functional, 'nf4', size)
  theirs, _ = quantized(functional, 'nf4_dq', size)
  q = encoded('nf4_dq', W, size)
  offset = np.float32(ours.json.loads(bytes(theirs['.quant_state.bitsandbytes__nf4']))['nested_offset'])
  np.testing.assert_allclose(q.scale.zero, [offset], rtol=3e-7)
  absmax = plain['.absmax'] - offset
  codes, outer = on_every_level(absmax, functional.create_dynamic_map())
  mine = qarray.encode(jnp.asarray(absmax), qarray.Spec(codebooks.DYNAMIC8, Flat(256)))
  np.testing.assert_array_equal(mine.codes, codes)
  np.testing.assert_array_equal(mine.scale, outer)
  np.testing.assert_array_equal(mine.scale, theirs['.nested_absmax'])


@pytest.mark.parametrize('name', ['nf4', 'fp4', 'nf4_dq'])
def test_we_read_theirs(functional, name):
  parts, want = quantized(functional, name, 64)
  np.testing.assert_allclose(qarray.decode(ours.qarray(parts)), want, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize('name', ['nf4', 'fp4', 'nf4_dq'])
def test_they_read_ours(functional, name):
  torch = pytest.importorskip('torch')
  q = encoded(name, W)
  parts = {'weight' + k: torch.asarray(np.array(v)) for k, v in ours.tensors(q).items()}
  packed = parts.pop('weight')
  state = functional.QuantState.from_dict({k.removeprefix('weight.'): v for k, v in parts.items()}, device='cpu')
  numbers = functional.dequantize_4bit(packed, state).numpy().T
  np.testing.assert_allclose(numbers, qarray.decode(q), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize('signed', [True, False])
def test_8_bit_moments_are_theirs(functional, signed):
  book = codebooks.DYNAMIC8 if signed else codebooks.DYNAMIC8_UNSIGNED
  code = functional.create_dynamic_map(signed)
  np.testing.assert_array_equal(book.levels(), code.numpy())
  x = W.ravel()[:256 * 256] if signed else W.ravel()[:256 * 256] ** 2
  codes, absmax = on_every_level(x, code)
  q = qarray.encode(jnp.asarray(x), qarray.Spec(book, Flat(256)))
  np.testing.assert_array_equal(q.scale, absmax)
  np.testing.assert_array_equal(q.codes, codes)
