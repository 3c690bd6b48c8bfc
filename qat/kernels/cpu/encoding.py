"""How the CPU's loops store codes: fields of 2, 4 or 8 bits in words, and what the loops must know of their values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import formats, packing

FLOAT8 = {4: jnp.float8_e4m3fn, 5: jnp.float8_e5m2}  # By exponent bits.


@dataclasses.dataclass(frozen=True)
class Encoding:
  """Fields of unsigned integers that stand for the values of a format.

  Attributes:
    bits: 2, 4 or 8.
    levels: the values of 16 fields; of 8 bits (center,), or the 48 factors of `_factors`.
    shift: of integers, what was added to a code; None for others.
    center: of integers, what a field is more than its value. Unsigned codes that have a zero are centered, since their
      sums would else be large, and cancel.
    dtype: of 8-bit floats, theirs; None for others.
  """
  bits: int
  levels: tuple
  shift: int | None = None
  center: int = 0
  dtype: type | None = None

  inputs = property(lambda self: 32 // self.bits)                        # Of a word.

  def padded(self, size):
    """The words' inputs of a group of `size`."""
    return size + -size % self.inputs

  def fields(self, codes, format):
    """Codes as unsigned numbers: u32[*shape]."""
    if self.shift is not None:
      return (codes.astype(jnp.int32) + self.shift).astype(jnp.uint32)
    if self.dtype is not None:                                           # Float6s are float8s too.
      numbers = format.decode(codes).astype(self.dtype)
      return jax.lax.bitcast_convert_type(numbers, jnp.uint8).astype(jnp.uint32)
    return packing.to_fields(codes, format).astype(jnp.uint32)

  def values(self, fields):
    """What fields stand for: u32[*shape] -> f32[*shape]."""
    if self.dtype is not None:
      return jax.lax.bitcast_convert_type(fields.astype(jnp.uint8), self.dtype).astype(jnp.float32)
    if self.shift is not None:
      return (fields.astype(jnp.int32) - self.center).astype(jnp.float32)
    return jnp.asarray(self.levels, jnp.float32)[fields.astype(jnp.int32)]

  def bit(self):
    """Where code 4 q + i of a word starts: [parts, 4]. Integer dot products take four codes a byte apart."""
    return (8 * np.arange(4) + self.bits * np.arange(8 // self.bits)[:, None]).astype(np.uint32)


@functools.lru_cache
def encoding(spec, size):
  """The Encoding of a grid in groups of `size` inputs, or why there is none: a str."""
  format, bits = spec.format, math.ceil(spec.format.bits)
  if bits <= 4:
    bits = 2 if bits <= 2 and size % 16 == 0 else 4
  elif bits <= 8:
    bits = 8
  if isinstance(format, formats.Binary | formats.Int):
    half = 2 ** (bits - 1)
    shift, center = (half, half) if format.min < 0 else (0, half if spec.zero is not None else 0)
    return Encoding(bits, (float(center),) if bits == 8 else _repeat(np.arange(2**bits) - center), shift, center)
  if bits <= 4:
    with jax.ensure_compile_time_eval():
      fields = jnp.minimum(jnp.arange(2**bits), 2**format.bits - 1).astype(jnp.uint8)
      return Encoding(bits, _repeat(format.decode(packing.from_fields(fields, format))))
  levels = np.asarray(format.levels(), np.float32)
  for exponent, dtype in FLOAT8.items():
    if bits == 8 and np.array_equal(levels.astype(dtype).astype(np.float32), levels):
      return Encoding(bits, _factors(exponent), dtype=dtype)
  return f'{format} has {len(levels)} values, which are neither integers nor float8s, nor 16 that fit in a register'


def _repeat(levels):
  """The values of 16 fields: the loops look up the lowest four bits."""
  return tuple(np.resize(np.asarray(levels, np.float32), 16).tolist())


def _factors(exponent):
  """A float8 as a product by its upper and lower four bits: 16 factors of each, where subnormals have their own lower.

  The lower four are the last bits of the exponent, and the fraction. Where the upper ones are 0, the numbers below
  exponent 1 are evenly spaced.
  """
  mantissa, bias = 7 - exponent, 2 ** (exponent - 1) - 1
  half = np.arange(16)
  fraction = half % 2**mantissa / 2**mantissa
  upper = np.where(half < 8, 1.0, -1.0) * 2.0 ** ((half % 8) * 2 ** (exponent - 3) - bias)
  lower = 2.0 ** (half >> mantissa) * (1 + fraction)
  subnormal = np.where(half < 2**mantissa, 2 * fraction, lower)
  return tuple(np.concatenate([upper, subnormal, lower]).tolist())
