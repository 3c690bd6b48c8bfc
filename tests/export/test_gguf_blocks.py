"""Two independent readers: the `gguf` package (numpy), and llama.cpp's own C through xllamacpp."""

import ctypes
import pathlib

import gguf
import jax
import numpy as np
import pytest
import xllamacpp

from qat.core import ggml, qarray, specs
from qat.export import gguf_blocks

TYPES = {n: (getattr(specs, n), gguf.GGMLQuantizationType[n]) for n in ggml.NAMES}
# Where blocks hold float16s, if not at 0.
FLOAT16S = dict(Q2_K=(80, 82), Q3_K=(108,), Q4_K=(0, 2), Q5_K=(0, 2), Q6_K=(208,), Q4_1=(0, 2), Q5_1=(0, 2))
SIMPLE = ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'MXFP4']
X = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
ROWS = np.concatenate([
    X * np.float32(0.02), X.round(1), X.clip(-1, 1), np.abs(X), np.zeros((2, 512), np.float32),
    np.full((1, 512), 2.5, np.float32), np.random.default_rng(1).standard_t(2, (8, 512)).astype(np.float32)])


@pytest.fixture(scope='module')
def ggml_c():
  library = next(pathlib.Path(xllamacpp.__file__).parent.glob('*.so'))
  return ctypes.CDLL(str(library))


def pointer(a):
  return a.ctypes.data_as(ctypes.c_void_p)


def quantize_in_c(ggml_c, x, kind):
  ggml_c.ggml_quantize_chunk.restype = ctypes.c_size_t
  ggml_c.ggml_quantize_init(int(kind))
  numbers, size = gguf.GGML_QUANT_SIZES[kind]
  out = np.zeros((len(x), x.shape[1] // numbers * size), np.uint8)
  wrote = ggml_c.ggml_quantize_chunk(int(kind), pointer(x), pointer(out), ctypes.c_int64(0),
                                     ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), None)
  assert wrote == out.size
  return out


def encode(x, spec):
  return jax.jit(ggml.encode, static_argnums=1)(x, spec)


def sqnr(x, x_hat):
  return 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((x.astype(np.float64) - x_hat) ** 2))


@pytest.mark.parametrize('name', SIMPLE)
def test_simple_blocks_are_the_bytes_of_gguf(name):
  spec, kind = TYPES[name]
  want = gguf.quants.quantize(ROWS, kind)
  q = encode(ROWS, spec)
  np.testing.assert_array_equal(gguf_blocks.to_bytes(q), want)
  np.testing.assert_array_equal(qarray.decode(q), gguf.quants.dequantize(want, kind))


@pytest.mark.parametrize('name', TYPES)
def test_any_bytes_decode_as_gguf_and_llama_cpp_do(name, ggml_c):
  spec, kind = TYPES[name]
  numbers, size = gguf.GGML_QUANT_SIZES[kind]
  data = np.random.default_rng(2).integers(0, 256, (8, 4 * size)).astype(np.uint8)
  blocks = data.reshape(-1, size)
  for at in FLOAT16S.get(name, (0,)):                                    # No NaNs.
    d = np.random.default_rng(at).standard_normal((len(blocks), 1)).astype(np.float16)
    blocks[:, at:at + 2] = d.view(np.uint8)
  if name == 'MXFP4':
    blocks[:, 0] = 100 + blocks[:, 0] % 50                               # No subnormals.
  shape = (8, 4 * numbers)
  q = gguf_blocks.from_bytes(data, spec, shape)
  value = np.asarray(qarray.decode(q))
  np.testing.assert_array_equal(value, gguf.quants.dequantize(data, kind))
  in_c = np.empty(shape, np.float32)
  function = getattr(ggml_c, f'dequantize_row_{name.lower().replace("_k", "_K")}')
  function(pointer(data), pointer(in_c), ctypes.c_int64(value.size))
  np.testing.assert_allclose(value, in_c, rtol=1e-6, atol=1e-6)          # C fuses multiply-adds.
  np.testing.assert_array_equal(gguf_blocks.to_bytes(q), data)


# SQNR of libggml on X in dB, and by how much ours may be below it: sums have another order, the
# scales of a super-block are rounded a little differently, and Q3_K's is another search.
SEARCHED = dict(IQ4_NL=(22.41, 0.0), Q2_K=(10.67, 0.01), Q3_K=(16.40, 0.1), Q4_K=(23.01, 0.0),
                Q5_K=(28.89, 0.02), Q6_K=(35.13, 0.01))


@pytest.mark.parametrize('name', SEARCHED)
def test_searched_blocks_come_close_to_llama_cpp(name, ggml_c):
  spec, kind = TYPES[name]
  in_c = quantize_in_c(ggml_c, X, kind)
  theirs = sqnr(X, gguf.quants.dequantize(in_c, kind))
  q = encode(X, spec)
  data = gguf_blocks.to_bytes(q)
  ours = sqnr(X, gguf.quants.dequantize(data, kind))
  anchor, short = SEARCHED[name]
  assert round(float(theirs), 2) == anchor
  assert ours >= theirs - short - 1e-4, f'{ours:.4f} dB, and libggml {theirs:.4f}'
  np.testing.assert_array_equal(gguf.quants.dequantize(data, kind), qarray.decode(q))


ANCHORS = dict(Q4_0=21.41, Q4_1=22.22, Q5_0=27.56, Q5_1=28.52, Q8_0=45.53, MXFP4=18.80)


@pytest.mark.parametrize('name', ANCHORS)
def test_simple_blocks_are_the_bytes_of_llama_cpp(name, ggml_c):
  spec, kind = TYPES[name]
  q = encode(X, spec)
  np.testing.assert_array_equal(gguf_blocks.to_bytes(q), quantize_in_c(ggml_c, X, kind))
  assert round(float(sqnr(X, qarray.decode(q))), 2) == ANCHORS[name]


def test_signs_of_k_quants_are_ggmls():
  """Scales above 0, minimums at 0 or below, of positive blocks as well."""
  x = np.abs(X) + 1
  x[:, 256:] = X[:, 256:]
  for name in ('Q2_K', 'Q4_K', 'Q5_K'):
    q = encode(x, TYPES[name][0])
    assert (qarray.decode(q.scale) > 0).all() and (qarray.decode(q.zero) <= 0).all()


@pytest.mark.parametrize('name', TYPES)
def test_a_kernel_is_encoded_as_its_transpose(name):
  rows = encode(X, TYPES[name][0])
  columns = encode(X.T.copy(), specs.kernel(TYPES[name][0]))
  np.testing.assert_array_equal(qarray.decode(columns).T, qarray.decode(rows))


def test_what_has_no_block_says_so():
  with pytest.raises(ValueError, match='ggml has no encoder for .*NF4'):
    ggml.encode(X, specs.NF4)
  with pytest.raises(ValueError, match='GGUF has no block for .*encode the transpose of a kernel'):
    gguf_blocks.to_bytes(qarray.encode(X.T, specs.kernel(specs.Q4_0)))
  with pytest.raises(ValueError, match='5 bytes for shape .*so there should be 18'):
    gguf_blocks.from_bytes(np.zeros(5, np.uint8), specs.Q4_0, (1, 32))
