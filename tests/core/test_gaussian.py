"""The distortion of every grid on the normal distribution, to the last digit that others printed.

x = np.random.default_rng(0).standard_normal((1024, 4096)), blocks along the rows, f32 scales.
Published anchors: bitsandbytes' test constants for NF4 (.072798 +- .000074 in blocks of 64,
.076831 of 128) and FP4 (.096543), compressed-tensors' MXFP4, and tables of other libraries.
"""

import jax
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, ranges, specs
from qat.core.blocks import Flat
from qat.core.qarray import QArray, Spec


def as_bitsandbytes(x):
  """Codes under the f32 scales, which are quantized afterwards: fake would use the scales that are stored."""
  scale, _ = ranges.centered(x, specs.NF4_DQ)
  return qarray.decode(QArray(qarray.encode(x, specs.NF4).codes, scale, None, specs.NF4_DQ))


def grid(spec, rule=ranges.absmax):
  return lambda x: qarray.fake(x, spec, *rule(x, spec))


def integer(bits, size):
  return grid(specs.integer(bits, (size,)), ranges.midrange)


# SQNR in dB and mean |x - x_hat|, as printed.
TABLE = {
    'nf4_64': (grid(specs.NF4), '20.73', '.072765'),
    'nf4_64_double': (as_bitsandbytes, '20.73', '.072838'),
    'nf4_128': (grid(Spec(codebooks.NF4, Flat(128))), '20.39', '.076836'),
    'fp4_bnb_64': (grid(specs.FP4_BNB), '18.27', '.096565'),
    'int4_32': (integer(4, 32), '20.46', '.0807'),
    'int4_64': (integer(4, 64), '19.76', '.0879'),
    'int4_128': (integer(4, 128), '19.11', '.0951'),
    'uint4_32': (grid(specs.affine(4, (32,))), '21.85', '.0690'),
    'uint4_64': (grid(specs.affine(4, (64,))), '20.81', '.0782'),
    'uint4_128': (grid(specs.affine(4, (128,))), '19.95', '.0865'),
    'int3_128': (integer(3, 128), '12.50', '.2035'),
    # The reference prints .1855, which is .1854495 rounded twice (in numpy's f64 as well).
    'uint3_128': (grid(specs.affine(3, (128,))), '13.33', '.18545'),
    'int2_128': (integer(2, 128), '5.20', '.471'),
    'uint2_128': (grid(specs.affine(2, (128,))), '5.96', '.433'),
    'int8_channel': (integer(8, None), '41.28', '.00745'),
    'fp8_channel': (grid(Spec(formats.FP8_E4M3, (None,))), '31.55', '.01793'),
    'mxfp8': (grid(specs.MXFP8, ranges.ocp_floor), '30.65', '.0187'),
    'mxfp6_e2m3': (grid(specs.MXFP6, ranges.ocp_floor), '30.94', '.0214'),
    'mxfp6_e3m2': (grid(specs.MXFP6_E3M2, ranges.ocp_floor), '25.36', '.0363'),
    'mxfp4_floor': (grid(specs.MXFP4, ranges.ocp_floor), '18.79', '.0861'),
    'mxfp4_even': (grid(specs.MXFP4, ranges.ocp_even), '19.03', '.0865'),
    'nvfp4': (grid(specs.NVFP4), '20.44', '.0714')}


@pytest.fixture(scope='module')
def x():
  return np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32)


@pytest.mark.parametrize('name', TABLE)
def test_distortion_to_the_last_digit(x, name):
  quantize, want_sqnr, want_error = TABLE[name]
  wrong = np.asarray(jax.jit(quantize)(x)) - x
  # Pairwise sums in f32 are good to 1e-6 of themselves.
  sqnr = 10 * np.log10(np.sum(x * x, dtype=np.float64) / np.sum(wrong * wrong, dtype=np.float64))
  error = np.mean(np.abs(wrong), dtype=np.float64)
  assert f'{sqnr:.2f}' == want_sqnr
  assert f'{error:.{len(want_error) - 1}f}'.removeprefix('0') == want_error


def test_encoding_under_the_stored_scales_is_better_than_bitsandbytes(x):
  error = lambda x_hat: np.mean(np.abs(x - x_hat), dtype=np.float64)
  ours = error(np.asarray(jax.jit(grid(specs.NF4_DQ, ranges.centered))(x)))
  assert f'{ours:.6f}' == '0.072827' and ours < 0.072838
