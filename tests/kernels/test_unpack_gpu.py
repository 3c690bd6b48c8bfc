"""The bits of unpacking, by an interpreter of the PTX that is compiled: no GPU has to run it to be found right."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qat.core import codebooks, formats
from qat.kernels import pipeline_gpu, unpack_gpu

FORMATS = [formats.INT4, formats.INT3, formats.INT2, formats.TERNARY, formats.BINARY, formats.UINT4, formats.UINT2,
           codebooks.NF4, codebooks.NF3, codebooks.FP4_BNB, codebooks.IQ4_NL, formats.FP4_E2M1, formats.FP4_E3M0,
           formats.INT8, formats.INT6, formats.UINT8, formats.UINT5, formats.FP8_E4M3, formats.FP8_E5M2]


class Ptx:
  """What unpack_gpu._Mlir makes instructions of, done at once on Python's integers."""

  def shift_right(self, word, count):
    return word >> count

  def bits_and(self, word, mask):
    return word & mask

  def bits_or(self, word, mask):
    return word | mask

  def kept(self, value):
    return value

  def asm(self, body, *words, results=1):
    registers = {f'${results + i}': word for i, word in enumerate(words)}
    for statement in body.strip('{} ').split(';'):
      if not (statement := statement.strip()) or statement.startswith('.reg'):
        continue
      op, operands = statement.split(' ', 1)
      out, *operands = [o.strip() for o in operands.split(',')]
      read = lambda o: registers[o] if o in registers else eval(o)  # A register, or an expression of constants.
      registers[out] = getattr(self, op.replace('.', '_'))(*map(read, operands)) & 0xFFFFFFFF
    out = [registers[f'${i}'] for i in range(results)]
    return out[0] if results == 1 else out

  # PTX ISA, sections on each instruction. https://docs.nvidia.com/cuda/parallel-thread-execution/
  mov_b32 = staticmethod(lambda a: a)
  and_b32 = staticmethod(lambda a, b: a & b)
  shr_u32 = staticmethod(lambda a, b: a >> b)

  def prmt_b32(self, a, b, selector):
    """Bytes of (b, a), each by 3 bits of the selector; a 4th would spread the byte's sign."""
    source, picks = (b << 32 | a).to_bytes(8, 'little'), [selector >> 4 * i & 15 for i in range(4)]
    assert max(picks) < 8
    return int.from_bytes(bytes(source[p] for p in picks), 'little')

  def lop3_b32(self, a, b, c, table):
    """The table's bit 4 a + 2 b + c, for each bit of the three."""
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))

  def sub_bf16x2(self, a, b):
    return join(halves(a) - halves(b))

  def mul_bf16x2(self, a, b):
    return join(halves(a) * halves(b))


def halves(word):
  return np.array([word & 0xFFFF, word >> 16], np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def join(pair):
  low, high = pair.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
  return high << 16 | low


def words(stored):
  """The memory of int4 or int8, as words of 32 bits: the first code is the lowest."""
  bits = 4 if stored.dtype == jnp.int4 else 8
  codes = np.asarray(stored.astype(jnp.int32)).reshape(-1, 32 // bits)
  return [sum((int(c) & 2**bits - 1) << bits * i for i, c in enumerate(row)) for row in codes]


def row_of(format):
  """128 codes in which all of the format's are, in no order, and their values."""
  levels = np.asarray(format.levels(), np.float32)
  values = np.random.default_rng(0).permutation(np.resize(levels, -(-len(levels) // 128) * 128))
  codes = format.encode(jnp.asarray(values))
  return codes, np.asarray(format.decode(codes))


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('format', FORMATS, ids=str)
def test_each_thread_gets_the_numbers_of_its_columns(format, exact):
  """Thread t of a quad holds columns 2t and 2t + 1 of each run of 8, the first in the low half."""
  way = unpack_gpu.unpacking(format)
  codes, values = row_of(format)
  expected = values - 128 if format is formats.UINT8 or format is formats.UINT5 else values
  expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32) + (0 if exact else way.bias)
  memory = words(unpack_gpu.shuffle(way.pack(codes), way))
  for w, word in enumerate(memory):
    quad, t = divmod(w, 4)
    for i, pair in enumerate(way.pairs(Ptx(), word, exact)):
      column = quad * 128 // way.bits + 8 * i + 2 * t
      np.testing.assert_array_equal(halves(pair), expected[column:column + 2])


@pytest.mark.parametrize('format', FORMATS, ids=str)
def test_numbers_undo_packing(format):
  """What interpret mode and `decode` use: the same numbers, but for tables' rounding to bfloat16."""
  way = unpack_gpu.unpacking(format)
  codes, values = row_of(format)
  stored = way.pack(codes)
  assert stored.dtype == (jnp.int4 if way.bits == 4 else jnp.int8)
  numbers = np.asarray(way.numbers(unpack_gpu.unshuffle(unpack_gpu.shuffle(stored, way), way)))
  moved = 128 if format is formats.UINT8 or format is formats.UINT5 else 0
  table = isinstance(way, unpack_gpu.Table16)
  np.testing.assert_allclose(numbers + moved, values, rtol=2.0**-8 if table else 0, atol=0)


def owners(layout, shape):
  """What the registers of a warpgroup hold, by Mosaic's own description: {(register, warp, lane): flat elements}."""
  x = np.arange(np.prod(shape)).reshape(shape)
  for tile in layout.tiling.tiles:                                       # [..., a, b] -> [..., a / s, b / t, s, t]
    lead, sizes = x.shape[:-len(tile)], x.shape[-len(tile):]
    x = x.reshape(*lead, *(n for size, t in zip(sizes, tile) for n in (size // t, t)))
    outer, inner = (range(len(lead) + j, x.ndim, 2) for j in (0, 1))
    x = x.transpose(*range(len(lead)), *outer, *inner)
  warp, lanes, vector = (tuple(d % x.ndim for d in dims) for dims in (
      layout.warp_dims, layout.lane_dims, (layout.vector_dim,)))
  found = {}
  for place in np.ndindex(*(1 if d in vector else n for d, n in enumerate(x.shape))):
    at = lambda dims: np.ravel_multi_index([place[d] for d in dims], [x.shape[d] for d in dims])
    register = tuple(0 if d in (*warp, *lanes, *vector) else i for d, i in enumerate(place))
    elements = x[tuple(slice(None) if d in vector else i for d, i in enumerate(place))]
    found[register, int(at(warp)), int(at(lanes))] = elements.tolist()
  return found


@pytest.mark.parametrize('parts', [1, 2])
@pytest.mark.parametrize('way', [unpack_gpu.Integers4(True), unpack_gpu.Table16((0.0,)), unpack_gpu.Integers8(True)],
                         ids=['LOP3', 'PRMT', 'bytes'])
def test_pairs_go_to_the_registers_where_wgmma_reads_them(way, parts):
  """By the layouts of registers that Mosaic documents, for a tile of 128 by 128: each thread has what it needs."""
  layouts = pytest.importorskip('jax.experimental.mosaic.gpu.fragmented_array')
  if (needs := pipeline_gpu.needs_jax()) is not None:
    pytest.skip(needs)
  shape, wgmma = (128, 128), layouts.WGMMA_LAYOUT
  part = (shape[0], shape[1] // parts)
  stored = owners({4: layouts.WGMMA_LAYOUT_UPCAST_4X, 8: layouts.WGMMA_LAYOUT_8BIT}[way.bits], shape)
  operand, registers = owners(wgmma, part), wgmma.registers_shape(part)
  # Position p of a run of memory holds the column that `shuffle` put there.
  columns = np.asarray(unpack_gpu.shuffle(jnp.arange(shape[1]), way))
  in_pair = (lambda i: (i, i + 4)) if way.order == unpack_gpu.APART else (lambda i: (2 * i, 2 * i + 1))
  seen = 0
  for (register, warp, lane), elements in stored.items():
    for i in range(16 // way.bits):
      p, place = unpack_gpu.pair_place(way, register, i, registers)
      wanted = [divmod(e, part[1]) for e in operand[place, warp, lane]]
      got = [divmod(elements[j], shape[1]) for j in in_pair(i)]
      assert [(r, p * part[1] + c) for r, c in wanted] == [(r, columns[c]) for r, c in got]
      seen += 1
  assert seen * 2 == shape[0] * shape[1]


def test_formats_without_a_way():
  for format in (formats.FP6_E2M3, formats.FP16, formats.E8M0, codebooks.normal_float(5), codebooks.DYNAMIC8):
    assert unpack_gpu.unpacking(format) is None


def test_every_statement_is_interpreted():
  """The interpreter would skip what it does not know, were it silent."""
  with pytest.raises(AttributeError, match='xor_b32'):
    Ptx().asm('xor.b32 $0, $1, $1;', 1)
  assert Ptx().asm('lop3.b32 $0, $1, 0x000F000F, 0x43084308, (0xf0 & 0xcc) ^ 0xaa;', 0xFFF3FFF9) == 0x430B4301
