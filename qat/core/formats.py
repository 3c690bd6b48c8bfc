"""Number formats: the finite set of values that a code can stand for.

A format knows nothing of scales, blocks or layers. Its numbers are f32 in the format's own
units. Every format has

    bits              of one code, when packed
    min, max          the smallest and the largest value
    round(x)          the value of the format that stands for x, saturating: [*shape] -> [*shape]
    encode(x)         its code, in the storage type
    decode(codes)     the codes' values, f32
    levels()          all values, ascending, as a tuple

and always decode(encode(x)) == round(x), bit for bit. `rounding` (core/rounding.py) is half to
even unless said.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qat.core import rounding as _rounding

half_even = _rounding.half_even


@dataclasses.dataclass(frozen=True)
class Int:
  """Integers of 1 to 8 bits. A narrow grid drops the lowest code, so that it is symmetric."""
  bits: int
  signed: bool = True
  narrow: bool = False

  def __post_init__(self):
    if not 1 <= self.bits <= 8:
      raise ValueError(f'Int(bits={self.bits}): integers have 1 to 8 bits. Pick a width in that range.')
    if self.narrow and (not self.signed or self.bits == 1):
      raise ValueError(f'{self}: a narrow grid drops the lowest of 3 or more signed codes. '
                       'Ask for signed=True and bits >= 2, or narrow=False.')

  def __str__(self):
    return 'U' * (not self.signed) + f'INT{self.bits}' + '_NARROW' * self.narrow

  @property
  def max(self):
    return 2.0 ** (self.bits - self.signed) - 1

  @property
  def min(self):
    return self.narrow - self.max - 1 if self.signed else 0.0

  @property
  def storage(self):
    # No int2: narrow types cost the compiler more than they save before packing.
    return jnp.uint8 if not self.signed else jnp.int4 if self.bits <= 4 else jnp.int8

  def levels(self):
    return tuple(np.arange(self.min, self.max + 1).tolist())

  def round(self, x, rounding=half_even):
    return clamp(rounding(x), self.min, self.max)

  def encode(self, x, rounding=half_even):
    return self.round(x, rounding).astype(self.storage)

  def decode(self, codes):
    return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Ternary(Int):
  """{-1, 0, 1}. Five of them pack into a byte (3^5 = 243 < 256): 1.6 bits each."""
  bits: float = 1.6
  signed: bool = True
  narrow: bool = True
  min = -1.0
  max = 1.0
  storage = jnp.int4

  def __post_init__(self):
    """Ternary is one grid: nothing to check."""

  def __str__(self):
    return 'TERNARY'


@dataclasses.dataclass(frozen=True)
class Binary:
  """{-1, 1}, one bit. Zero counts as positive (DoReFa-Net, Eq. 7)."""
  bits: int = 1
  min = -1.0
  max = 1.0
  storage = jnp.int4

  def __str__(self):
    return 'BINARY'

  def levels(self):
    return (-1.0, 1.0)

  def round(self, x, rounding=half_even):
    """The sign: with two values, `rounding` has no say unless it is stochastic."""
    if isinstance(rounding, _rounding.Stochastic):
      return 2 * rounding(jnp.clip((x + 1) * 0.5, 0, 1)) - 1
    return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))

  def encode(self, x, rounding=half_even):
    return self.round(x, rounding).astype(self.storage)

  def decode(self, codes):
    return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Float:
  """A sign, `exponent` and `mantissa` bits, subnormals, no infinities: any eXmY.

  Codes are of `dtype` where XLA holds the type, and else bit patterns in uint8. `max` is the
  largest finite value: by default every code is a number; types that keep codes for NaN or
  infinity say so.
  """
  exponent: int
  mantissa: int
  dtype: type | None = None
  largest: float | None = None

  bits = property(lambda self: 1 + self.exponent + self.mantissa)
  bias = property(lambda self: max(2 ** (self.exponent - 1) - 1, 1))
  storage = property(lambda self: self.dtype or jnp.uint8)

  def __post_init__(self):
    if self.dtype is None and (self.exponent < 1 or self.mantissa < 0 or self.bits > 8):
      raise ValueError(f'{self}: a minifloat has 1 or more exponent bits and 8 bits in all, not '
                       f'{self.bits}. Use FP16 or BF16 for wider scales.')

  def __str__(self):
    return f'FP{self.bits}_E{self.exponent}M{self.mantissa}'

  @property
  def max(self):
    """(2 - 2^-m) 2^(2^e - 1 - bias), unless codes at the top are taken."""
    return self.largest or (2 - 2.0 ** -self.mantissa) * 2.0 ** (2**self.exponent - 1 - self.bias)

  @property
  def min(self):
    return -self.max

  def levels(self):
    return tuple(sorted({v for v in _table(self) if np.isfinite(v) and abs(v) <= self.max}))

  def round(self, x, rounding=half_even):
    if self.exponent == 8:  # bfloat16: spacings below f32's smallest number; let XLA round.
      if rounding is not half_even:
        raise ValueError(f'{self} is rounded half to even only, not by {rounding}.')
      return jax.lax.reduce_precision(jnp.clip(x, self.min, self.max), 8, self.mantissa)
    field = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> 23    # exponent of |x|, + 127
    field = clamp(field, 128 - self.bias, 254)                           # subnormals: the lowest
    spacing = _power_of_two(field - self.mantissa)
    inverse = _power_of_two(254 - (field - self.mantissa))
    return clamp(rounding(x * inverse) * spacing, self.min, self.max)

  def encode(self, x, rounding=half_even):
    x = self.round(x, rounding)
    if self.dtype is not None:
      return x.astype(self.dtype)
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    field = ((word >> 23) & 255) - 127 + self.bias
    normal = (field << self.mantissa) | ((word >> (23 - self.mantissa)) & (2**self.mantissa - 1))
    subnormal = (jnp.abs(x) * 2.0 ** (self.bias - 1 + self.mantissa)).astype(jnp.int32)
    sign = (word < 0).astype(jnp.int32) << (self.bits - 1)
    return (sign | jnp.where(field > 0, normal, subnormal)).astype(jnp.uint8)

  def decode(self, codes):
    if self.dtype is not None:
      return codes.astype(jnp.float32)
    return jnp.asarray(_table(self), jnp.float32)[codes.astype(jnp.int32)]


def clamp(x, low, high):
  """x within [low, high], as one operation."""
  return jax.lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))


@functools.lru_cache
def _table(format):
  """The value of each bit pattern of a Float."""
  if format.dtype is not None:
    word = np.uint16 if format.bits == 16 else np.uint8
    return tuple(np.arange(2**format.bits).astype(word).view(format.dtype).astype(np.float32).tolist())
  code = np.arange(2**format.bits)
  sign = 1.0 - 2 * (code >> (format.bits - 1))
  field = (code >> format.mantissa) % 2**format.exponent
  fraction = (code % 2**format.mantissa) / 2**format.mantissa
  normal = (1 + fraction) * 2.0 ** (field - format.bias)
  return tuple((sign * np.where(field > 0, normal, fraction * 2.0 ** (1 - format.bias))).tolist())


def _power_of_two(field):
  """2^(field - 127), exactly, for i32 fields 1..254."""
  return jax.lax.bitcast_convert_type(field << 23, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Exponent:
  """E8M0: the powers of two 2^-127 .. 2^127, the shared scales of microscaling (MX) formats.

  There is no zero and no sign. XLA flushes 2^-127, which is subnormal in f32, to zero in
  arithmetic, so numbers are kept at 2^-126 or more.
  """
  bits: int = 8
  min = 2.0**-126
  max = 2.0**127
  storage = jnp.float8_e8m0fnu

  def __str__(self):
    return 'E8M0'

  def levels(self):
    return tuple(2.0**k for k in range(-126, 128))

  def round(self, x, rounding=half_even):
    x = jnp.clip(x, self.min, self.max)
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    significand = jax.lax.bitcast_convert_type((word & (2**23 - 1)) | 127 << 23, jnp.float32)
    significand = rounding(significand)                                  # [1, 2) to 1 or 2; 1.5 to 2
    return jnp.minimum(significand * _power_of_two(word >> 23), self.max)

  def encode(self, x, rounding=half_even):
    return self.round(x, rounding).astype(self.storage)

  def decode(self, codes):
    return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Codebook:
  """Any ascending list of levels, stored as indices."""
  values: tuple[float, ...]
  name: str = ''

  def __str__(self):
    return self.name or f'Codebook({len(self.values)} levels)'

  def __post_init__(self):
    if list(self.values) != sorted(set(self.values)) or len(self.values) > 256:
      raise ValueError(f'Codebook of {len(self.values)} values {self.values[:8]}...: the levels must '
                       'ascend, without repeats, and be at most 256. Sort them, or drop the twins.')

  bits = property(lambda self: max((len(self.values) - 1).bit_length(), 1))
  min = property(lambda self: self.values[0])
  max = property(lambda self: self.values[-1])
  storage = jnp.uint8

  def levels(self):
    return self.values

  def index(self, x, rounding=half_even):
    """i32[*shape], the index of the level that stands for each x."""
    levels = np.asarray(self.values, np.float32)
    if rounding is half_even:  # Nearest; a tie goes to the lower level, as in bitsandbytes.
      return _count_below(x, (levels[1:] + levels[:-1]) / 2)
    low = jnp.maximum(_count_below(x, levels) - 1, 0)
    low = jnp.where(x >= levels[-1], len(levels) - 2, low)
    below, above = jnp.asarray(levels)[low], jnp.asarray(levels)[low + 1]
    fraction = jnp.clip((x - below) / (above - below), 0, 1)
    return low + rounding(fraction).astype(jnp.int32)

  def round(self, x, rounding=half_even):
    if rounding is not half_even or len(self.values) > 32:
      return jnp.asarray(self.values, jnp.float32)[self.index(x, rounding)]
    levels = np.asarray(self.values, np.float32)
    value = jnp.full_like(x, levels[0])
    for middle, level in zip((levels[1:] + levels[:-1]) / 2, levels[1:]):
      value = jnp.where(x > middle, level, value)
    return value

  def encode(self, x, rounding=half_even):
    return self.index(x, rounding).astype(jnp.uint8)

  def decode(self, codes):
    return jnp.asarray(self.values, jnp.float32)[codes.astype(jnp.int32)]


def _count_below(x, bounds):
  """How many of the ascending `bounds` are smaller than each x: i32[*shape]."""
  if len(bounds) > 32:
    return jnp.searchsorted(jnp.asarray(bounds), x, side='left')
  return sum((x > b).astype(jnp.int32) for b in bounds)


Format = Int | Binary | Float | Exponent | Codebook

INT8, INT7, INT6, INT5, INT4, INT3, INT2 = (Int(b) for b in (8, 7, 6, 5, 4, 3, 2))
UINT8, UINT7, UINT6, UINT5, UINT4, UINT3, UINT2, UINT1 = (
    Int(b, signed=False) for b in (8, 7, 6, 5, 4, 3, 2, 1))
INT8_NARROW, INT4_NARROW, INT3_NARROW, INT2_NARROW = (Int(b, narrow=True) for b in (8, 4, 3, 2))
TERNARY, BINARY = Ternary(), Binary()

FP16 = Float(5, 10, jnp.float16, 65504.0)
BF16 = Float(8, 7, jnp.bfloat16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max))
FP8_E4M3 = Float(4, 3, jnp.float8_e4m3fn, 448.0)     # e4m3fn: S.1111.111 is NaN
FP8_E5M2 = Float(5, 2, jnp.float8_e5m2, 57344.0)     # IEEE: the top exponent is infinity and NaN
FP6_E2M3, FP6_E3M2 = Float(2, 3), Float(3, 2)        # OCP MX 1.0
FP4_E2M1 = Float(2, 1, jnp.float4_e2m1fn)
FP4_E3M0 = Float(3, 0)
E8M0 = Exponent()
