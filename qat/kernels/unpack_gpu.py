"""Codes of 4 and 8 bits to bf16, within the registers of a Hopper warpgroup.

wgmma takes its left operand from registers, of which thread t of a quad holds, in each run of 8 columns, columns 2t
and 2t + 1. A load of 32 bits gives the thread 8 neighbours of 4 bits, or 4 of 8. So that no bit has to change threads,
K is shuffled when the weight is prepared: what a thread loads is what it needs. Marlin shuffles for the fragments of
Ampere: Frantar et al. MARLIN, 2024. https://arxiv.org/abs/2408.11743

From 128 on, bf16 counts by ones: the bits 0x4300 | u are 128 + u, for u < 128. Integers of 4 bits so become numbers by
one LOP3 for two; the bias stays in, and is taken from the product, as bias times the sum of the inputs. Kim et al. Who
Says Elephants Can't Run, 2022, do so for fp16. https://arxiv.org/abs/2211.10017. Tables of 16 numbers are looked up by
PRMT, which picks bytes of 8 by 3 bits each.

Each way of unpacking has the `bits` of a code, the `order` of the shuffle, the `bias` left in, and

    pack(codes)       codes as the kernel stores them, before the shuffle: int4 or int8 [*shape]
    numbers(stored)   their values, f32, without the bias
    pairs(word, ...)  MLIR: 32 bits of codes -> words of two bf16, one for each run of 8 columns
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qat.core import formats


# Columns 8 i + 2 t + h of a run, as axes (i, t, h): how the codes of thread t follow each other, lowest bits first.
APART = (1, 2, 0)                  # [t, h, i]: a pair of neighbours 16 bits apart, where LOP3 finds both.
PAIRED = (1, 0, 2)                 # [t, i, h]: a pair side by side, as bytes are picked.


@dataclasses.dataclass(frozen=True)
class Integers4:
  """Integers of up to 4 bits: 1 LOP3 for two, and every other a shift."""
  signed: bool
  bits = 4
  order = APART

  @property
  def bias(self):
    return 136.0 if self.signed else 128.0           # Flipping the sign bit adds 8 to two's complement.

  def pack(self, codes):
    return _wrap4(codes)

  def numbers(self, stored):
    return _nibbles(stored, self.signed).astype(jnp.float32)

  def pairs(self, mlir, word, exact):
    magic = 0x43084308 if self.signed else 0x43004300
    body = f'lop3.b32 $0, $1, 0x000F000F, {magic}, (0xf0 & 0xcc) ^ 0xaa;'
    if exact:
      body = (f'{{ .reg .b32 a, b; lop3.b32 a, $1, 0x000F000F, {magic}, (0xf0 & 0xcc) ^ 0xaa; '
              f'mov.b32 b, {magic}; sub.bf16x2 $0, a, b; }}')
    return [mlir.asm(body, mlir.shift_right(word, 4 * i)) for i in range(4)]


@dataclasses.dataclass(frozen=True)
class Table16:
  """Any 16 numbers, as bf16: 8 PRMT for 4."""
  values: tuple
  bits, order, bias = 4, PAIRED, 0.0

  def pack(self, codes):
    if jnp.issubdtype(codes.dtype, jnp.floating):
      codes = jax.lax.bitcast_convert_type(codes, jnp.uint4)
    return _wrap4(codes)

  def numbers(self, stored):
    index, value = _nibbles(stored, signed=False), jnp.zeros(stored.shape, jnp.float32)
    for i, level in enumerate(self.rounded().tolist()):                   # A kernel may hold no table.
      value = jnp.where(index == i, level, value)
    return value

  def rounded(self):
    """The levels as the kernel has them: f32[16], each a bf16."""
    values = np.zeros(16, np.float32)
    values[:len(self.values)] = self.values
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)

  def bytes(self):
    """Low and high bytes of the 16 levels, 4 to a word: two lists of 4 ints."""
    word = self.rounded().astype(ml_dtypes.bfloat16).view(np.uint16)
    return [np.ascontiguousarray(b.astype(np.uint8)).view('<u4').tolist() for b in (word & 255, word >> 8)]

  def pairs(self, mlir, word, exact):
    del exact  # There is no bias.
    index = mlir.bits_and(word, 0x77777777)             # The low 3 bits pick within 8 levels; the 4th picks which 8.
    upper = mlir.bits_or(mlir.shift_right(mlir.bits_and(word, 0x88888888), 1), 0x32103210)
    tables = [mlir.kept(t) for table in self.bytes() for t in table]
    body = ('{ .reg .b32 a, b, l, h; prmt.b32 a, $4, $5, $2; prmt.b32 b, $6, $7, $2; prmt.b32 l, a, b, $3; '
            'prmt.b32 a, $8, $9, $2; prmt.b32 b, $10, $11, $2; prmt.b32 h, a, b, $3; '
            'prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; }')
    halves = [(mlir.shift_right(index, shift), mlir.shift_right(upper, shift)) for shift in (0, 16)]
    return [pair for half in halves for pair in mlir.asm(body, *half, *tables, results=2)]


@dataclasses.dataclass(frozen=True)
class Integers8:
  """Integers of 5 to 8 bits: PRMT, 2 LOP3 and a subtraction for two.

  With 0x43 above a byte b, the low 7 bits give a = 128 + (b & 127), and bit 7, which lies in the exponent, 128 or 256:
  a less that is b in two's complement. CUTLASS converts so too.
  """
  signed: bool
  bits, order, bias = 8, PAIRED, 0.0

  def pack(self, codes):
    return codes if self.signed else (codes.astype(jnp.int32) - 128).astype(jnp.int8)

  def numbers(self, stored):
    return stored.astype(jnp.float32)

  def pairs(self, mlir, word, exact):
    del exact
    body = ('{{ .reg .b32 s, a, b; prmt.b32 s, $1, $2, {0}; and.b32 a, s, 0xff7fff7f; and.b32 b, s, 0xff80ff80; '
            'sub.bf16x2 $0, a, b; }}')
    return [mlir.asm(body.format(s), word, mlir.kept(0x43)) for s in ('0x4140', '0x4342')]


@dataclasses.dataclass(frozen=True)
class Floats8:
  """E4M3 and E5M2: sign and magnitude moved to bf16's places, times the power of two between their biases.

  Codes of infinity and NaN, which no encoder here makes, become large numbers.
  """
  exponent: int
  mantissa: int
  bits, order, bias = 8, PAIRED, 0.0

  def pack(self, codes):
    return jax.lax.bitcast_convert_type(codes, jnp.int8)

  def numbers(self, stored):
    dtype = {3: jnp.float8_e4m3fn, 2: jnp.float8_e5m2}[self.mantissa]
    return jax.lax.bitcast_convert_type(stored, dtype).astype(jnp.float32)

  def pairs(self, mlir, word, exact):
    del exact
    shift = 8 - self.exponent                         # Mantissas end at bits 8 - exponent..7 of bf16's word.
    power = 127 - (2 ** (self.exponent - 1) - 1)      # 2^120 for E4M3, 2^112 for E5M2.
    scale = (power + 127) << 7
    magnitude = (0x7F00 >> shift) * 0x10001
    body = (f'{{{{ .reg .b32 s, m; prmt.b32 s, $1, 0, {{0}}; shr.u32 m, s, {shift}; and.b32 m, m, {magnitude}; '
            f'lop3.b32 m, s, 0x80008000, m, (0xf0 & 0xcc) | 0xaa; mov.b32 s, {scale * 0x10001}; '
            'mul.bf16x2 $0, m, s; }}')
    return [mlir.asm(body.format(s), word) for s in ('0x1404', '0x3424')]


def unpacking(format):
  """How the numbers of `format` are unpacked, or None where there is no such way."""
  if isinstance(format, formats.Binary):
    return Integers4(True)
  if isinstance(format, formats.Int):
    return Integers4(format.signed) if format.bits <= 4 else Integers8(format.signed)
  if isinstance(format, formats.Codebook) and len(format.values) <= 16:
    return Table16(format.values)
  if isinstance(format, formats.Float) and format.bits == 4:
    return Table16(tuple(_floats4(format)))
  if format in (formats.FP8_E4M3, formats.FP8_E5M2):
    return Floats8(format.exponent, format.mantissa)
  return None


def shuffle(stored, way):
  """Columns in the places where the kernel reads them: [..., k], k a multiple of 128 / bits."""
  return _transpose(stored, (16 // way.bits, 4, 2), way.order)


def unshuffle(stored, way):
  """The inverse of `shuffle`."""
  sizes = (16 // way.bits, 4, 2)
  return _transpose(stored, tuple(sizes[a] for a in way.order), tuple(way.order.index(a) for a in range(3)))


def _transpose(x, sizes, axes):
  """Transposes each run of the last axis, seen as [*sizes]."""
  lead = x.ndim
  runs = x.reshape(*x.shape[:-1], -1, *sizes)
  return jnp.transpose(runs, (*range(lead), *(lead + a for a in axes))).reshape(x.shape)


def in_registers(way, rows, columns, parts, exact):
  """The function that unpacks a tile which wgmma's registers hold.

  Args:
    way: how, of this file.
    rows, columns: of the tile.
    parts: into how many equal runs of columns the result is cut.
    exact: whether to take the bias away.

  Returns:
    (int4 or int8 [rows, columns], in `loaded(way)`'s layout) -> tuple of bf16[rows, columns / parts].
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu
  part = plgpu.ShapeDtypeStruct((rows, columns // parts), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

  @plgpu.inline_mgpu(arg_types=(loaded(way),), return_type=(part,) * parts)
  def unpack(_, tile):
    from jax.experimental.mosaic import gpu as mgpu
    mlir = _Mlir()
    shape = mgpu.WGMMA_LAYOUT.registers_shape(part.shape)               # [rows / 64, columns / 8, ...]
    registers = [np.empty(shape, dtype=object) for _ in range(parts)]
    for index, register in np.ndenumerate(tile.registers):
      for i, pair in enumerate(way.pairs(mlir, mlir.word(register), exact)):
        p, place = pair_place(way, index, i, shape)
        registers[p][place] = mlir.bf16x2(pair)
    return tuple(mgpu.FragmentedArray(_registers=r, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None) for r in registers)

  return unpack


def pair_place(way, index, i, shape):
  """Where pair i of the word in register `index` goes: which part, and the index of a register in it.

  Registers are indexed by blocks of 64 rows, then runs of columns: 128 / bits long in a loaded tile, and 8 in wgmma's
  operand, of whose `shape` the parts are. The rest are rows within a block, alike in both.
  """
  row, run, *rest = index
  part, column = divmod(run * (16 // way.bits) + i, shape[1])
  return part, (row, column, *rest) + (0,) * (len(shape) - 2 - len(rest))


def loaded(way):
  """The layout of registers that a tile of codes is loaded to."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  return {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_8BIT}[way.bits]


class _Mlir:
  """The few operations on words that unpacking takes."""

  def __init__(self):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector
    self._ir, self._arith, self._llvm, self._vector = ir, arith, llvm, vector
    self._i32 = ir.IntegerType.get_signless(32)
    self._one = ir.VectorType.get((1,), self._i32)
    self._two = ir.VectorType.get((2,), ir.BF16Type.get())
    self._zero, self._kept = None, {}

  def constant(self, value):
    value = value - 2**32 if value >= 2**31 else value
    return self._arith.constant(self._i32, self._ir.IntegerAttr.get(self._i32, value))

  def kept(self, value):
    """A constant in a register, where ptxas leaves what it cannot know: a known one it moves there before each use."""
    if self._zero is None:
      self._zero = self.asm('mov.u32 $0, %smid; shr.u32 $0, $0, 31;')
    if value not in self._kept:
      self._kept[value] = self._arith.xori(self._zero, self.constant(value))
    return self._kept[value]

  def word(self, register):
    from jax.experimental.mosaic import gpu as mgpu
    return mgpu.utils.bitcast(register, self._i32)

  def bf16x2(self, word):
    return self._vector.bitcast(self._two, self._vector.broadcast(self._one, word))

  def shift_right(self, word, count):
    return word if count == 0 else self._arith.shrui(word, self.constant(count))

  def bits_and(self, word, mask):
    return self._arith.andi(word, self.constant(mask))

  def bits_or(self, word, mask):
    return self._arith.ori(word, self.constant(mask))

  def asm(self, body, *words, results=1):
    """PTX of words `$0`, ... to one word, or to a list of `results`."""
    constraints = ','.join(['=r'] * results + ['r'] * len(words))
    if results == 1:
      return self._llvm.inline_asm(self._i32, list(words), body, constraints)
    struct = self._llvm.StructType.get_literal([self._i32] * results)
    out = self._llvm.inline_asm(struct, list(words), body, constraints)
    return [self._llvm.extractvalue(self._i32, out, [j]) for j in range(results)]


def _nibbles(stored, signed):
  """int4 bit patterns as i32: signed, or 0..15."""
  wide = stored.astype(jnp.int32)
  return wide if signed else wide & 15


def _wrap4(codes):
  """The low 4 bits of any whole codes: int4."""
  return ((codes.astype(jnp.int32) << 28) >> 28).astype(jnp.int4)


def _floats4(format):
  """The value of each of the 16 bit patterns."""
  codes = np.arange(16, dtype=np.uint8)
  if format.dtype is not None:
    return codes.view(format.dtype).astype(np.float32).tolist()
  return np.asarray(format.decode(jnp.asarray(codes))).tolist()
