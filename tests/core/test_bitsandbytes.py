"""bitsandbytes' 4-bit types: onnxruntime has an encoder of its own, in C++."""

import dataclasses

import jax
import numpy as np
from onnxruntime.capi import _pybind_state as ort
import pytest

from qat.core import codebooks, packing, qarray, ranges, specs
from qat.core.blocks import Flat
from qat.core.qarray import Spec

# bitsandbytes' FP4 in the order of its codes: the sign is the fourth bit.
FP4_BY_CODE = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12)
W = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)


def test_constants():
  """As bitsandbytes prints them, to 4 digits, and in full where QLoRA's Appendix E gives them."""
  want = [-1, -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0, .0796, .1609, .2461, .3379, .4407, .5626, .7230, 1]
  np.testing.assert_allclose(codebooks.NF4.levels(), want, atol=5.1e-5)
  # Derived from the normal's quantiles, NF4 is bitsandbytes' but for the precision of its ppf.
  np.testing.assert_allclose(codebooks.normal_float(4).levels(), codebooks.NF4.levels(), atol=2e-7)
  both = np.unique(np.concatenate([FP4_BY_CODE, -FP4_BY_CODE]))
  np.testing.assert_array_equal(codebooks.FP4_BNB.levels(), both)


@pytest.mark.parametrize('signed', [True, False])
def test_dynamic_map(signed):
  """create_dynamic_map(signed, max_exponent_bits=7, total_bits=8), written out in float64."""
  values = [0.0, 1.0]
  for i in range(7):
    edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
    means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
    values += [*means, *-means] if signed else [*means]
  book = codebooks.DYNAMIC8 if signed else codebooks.DYNAMIC8_UNSIGNED
  np.testing.assert_allclose(book.levels(), np.sort(values), rtol=2e-7)
  assert len(book.levels()) == 256


def with_peaks(w, size):
  """`w`, in which each run of 256 has the largest |x| of its run of `size`: for an encoder of runs of 256 at most."""
  runs = w.reshape(-1, size).copy()
  runs[:, ::256] = np.abs(runs).max(1, keepdims=True) * np.sign(runs[:, ::256])
  return runs.reshape(w.shape)


@pytest.mark.parametrize('size', [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize('name', ['NF4', 'FP4_BNB'])
def test_bytes_and_absmax_are_onnxruntimes(name, size):
  kind, theirs = dict(NF4=1, FP4_BNB=0)[name], min(size, 256)
  w = W if size == theirs else with_peaks(W, size)
  data, absmax = np.zeros(W.size // 2, np.uint8), np.zeros(W.size // theirs, np.float32)
  ort.quantize_matmul_bnb4(data, w, absmax, theirs, kind, *W.shape)
  book = getattr(codebooks, name)
  q = jax.jit(qarray.encode, static_argnums=1)(w, Spec(book, Flat(size)))
  np.testing.assert_array_equal(np.repeat(q.scale, size // theirs), absmax)
  if name == 'NF4':
    np.testing.assert_array_equal(packing.pack(q.codes.ravel(), book, packing.HighFirst()), data)
  else:  # Theirs has a -0, so that numbers are compared: ours ascend, and have one zero.
    codes = packing.unpack(data, book, W.size, packing.HighFirst())
    by_code = np.concatenate([FP4_BY_CODE, -FP4_BY_CODE])
    np.testing.assert_array_equal(by_code[np.asarray(codes)].reshape(W.shape), book.decode(q.codes))


def nested_by_hand(absmax, offset=None):
  """bitsandbytes' functional.quantize_4bit(compress_statistics=True), in numpy."""
  offset = absmax.mean(dtype=np.float64).astype(np.float32) if offset is None else offset
  blocks = (absmax - offset).reshape(-1, 256)
  outer = np.abs(blocks).max(1, keepdims=True)
  levels = np.float32(codebooks.DYNAMIC8.levels())
  codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, blocks * (1 / outer), side='left')
  return codes, outer[:, 0], offset


def test_double_quantization():
  w = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)              # 4 blocks of blocks
  absmax = np.abs(w.reshape(-1, 64)).max(1)
  codes, outer, offset = nested_by_hand(absmax)
  scale, _ = jax.jit(ranges.centered, static_argnums=1)(w, specs.NF4_DQ)
  np.testing.assert_allclose(scale.zero, [offset], rtol=1e-6)
  np.testing.assert_allclose(scale.scale, outer, rtol=1e-5)
  assert np.mean(np.asarray(scale.codes) != codes.ravel()) < 0.02                     # The mean has another last bit.
  np.testing.assert_allclose(qarray.decode(scale), absmax, rtol=0.01)


@pytest.mark.parametrize('size', [64, 128, 256, 512, 1024, 2048, 4096])
def test_codes_of_scales_are_exact_for_the_mean_that_is_there(size):
  """Every code and every outer absmax: only the mean's last bit depends on the order of a sum."""
  w = np.random.default_rng(2).standard_normal((1024, 1024)).astype(np.float32) ** 3   # 4096 leaves one block of 256
  absmax = np.abs(w.reshape(-1, size)).max(1)
  spec = dataclasses.replace(specs.NF4_DQ, block=Flat(size))
  scale, _ = jax.jit(ranges.centered, static_argnums=1)(w, spec)
  np.testing.assert_allclose(scale.zero, [absmax.mean(dtype=np.float64)], rtol=3e-7)
  codes, outer, _ = nested_by_hand(absmax, np.asarray(scale.zero)[0])
  np.testing.assert_array_equal(scale.scale, outer)
  np.testing.assert_array_equal(scale.codes, codes.ravel())


def test_double_quantization_takes_4_127_bits():
  x = jax.ShapeDtypeStruct((1024, 4096), np.float32)
  q = jax.eval_shape(lambda x: qarray.encode(x, specs.NF4_DQ, *ranges.centered(x, specs.NF4_DQ)), x)
  assert round(q.nbits / x.size, 3) == 4.127


def test_centered_needs_a_minimum_above_its_scales():
  with pytest.raises(ValueError, match='its scales have no Min to hold their mean'):
    ranges.centered(W, specs.NF4)
