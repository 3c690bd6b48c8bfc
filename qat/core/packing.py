"""Packing: codes of 1 to 8 bits into bytes or 32-bit words, along the last axis.

A layout is a value:

    LowFirst(8), LowFirst(32)     a dense stream, the first code in the lowest bits; codes may
                                  straddle words. GPTQ, AWQ before its own order, ONNX,
                                  compressed-tensors >= 0.18, NVFP4 and MXFP4 checkpoints
    HighFirst(8), HighFirst(32)   the first code in the highest bits: bitsandbytes, ModelOpt's NF4
    Trits()                       five ternary codes a byte, base 3, the first lowest: 3^5 = 243

`pack` first turns codes into unsigned fields: signed integers are offset by 2^(bits-1), as GPTQ
and compressed-tensors store them; floats and codebooks keep their bit patterns, or indices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import formats

POWERS = np.int32([1, 3, 9, 27, 81])


def _check_width(layout):
  if layout.width not in (8, 32):
    raise ValueError(f'{layout}: words have 8 or 32 bits. Use {type(layout).__name__}(8) or (32).')


@dataclasses.dataclass(frozen=True)
class LowFirst:
  """A dense stream into words of `width` bits, least significant bit first."""
  width: int = 8

  def __post_init__(self):
    _check_width(self)

  def pack(self, fields, bits):
    """[..., n] fields of `bits` bits -> [..., ceil(n bits / width)] words."""
    stream = _bits(fields, np.arange(bits))                              # [..., n bits]
    return _words(stream, np.arange(self.width), self.width)

  def unpack(self, words, bits, count):
    """[..., words] -> [..., count] fields, uint8."""
    stream = _bits(_unsigned(words), np.arange(self.width))
    return _fields(stream, np.arange(bits), count)


@dataclasses.dataclass(frozen=True)
class HighFirst:
  """A dense stream into words of `width` bits, most significant bit first."""
  width: int = 8

  def __post_init__(self):
    _check_width(self)

  def pack(self, fields, bits):
    stream = _bits(fields, np.arange(bits)[::-1])
    return _words(stream, np.arange(self.width)[::-1], self.width)

  def unpack(self, words, bits, count):
    stream = _bits(_unsigned(words), np.arange(self.width)[::-1])
    return _fields(stream, np.arange(bits)[::-1], count)


@dataclasses.dataclass(frozen=True)
class Trits:
  """Five fields of 0, 1, 2 in a byte."""

  def pack(self, fields, bits):
    trits = _pad(fields, 5).astype(jnp.int32)                            # [..., words, 5]
    return jnp.sum(trits * _like(POWERS, fields), axis=-1).astype(jnp.uint8)

  def unpack(self, words, bits, count):
    fields = words.astype(jnp.int32)[..., None] // _like(POWERS, words) % 3
    return fields.reshape(*words.shape[:-1], -1)[..., :count].astype(jnp.uint8)


def pack(codes, format, layout=LowFirst()):
  """Packs codes.

  Args:
    codes: [..., n], of the format's storage type.
    format: a format of at most 8 bits.
    layout: where the bits go.

  Returns:
    [..., words] uint8 or int32.

  >>> pack(jnp.array([1, 2, 3], jnp.uint8), formats.UINT4)
  Array([33,  3], dtype=uint8)
  >>> pack(jnp.array([1, 2, 3], jnp.uint8), formats.UINT4, HighFirst())
  Array([18, 48], dtype=uint8)
  """
  return layout.pack(to_fields(codes, format), _width(format, layout))


def unpack(words, format, count, layout=LowFirst()):
  """The inverse of `pack`: [..., words] -> [..., count] codes."""
  return from_fields(layout.unpack(words, _width(format, layout), count), format)


def to_fields(codes, format):
  """Codes as unsigned numbers below 2^bits: uint8[*shape]."""
  if isinstance(format, formats.Float | formats.Exponent):
    return _bit_pattern(codes)
  if isinstance(format, formats.Binary):
    return (codes > 0).astype(jnp.uint8)
  return (codes.astype(jnp.int32) + _offset(format)).astype(jnp.uint8)


def from_fields(fields, format):
  """The inverse of `to_fields`."""
  if isinstance(format, formats.Float | formats.Exponent):
    storage = jnp.dtype(format.storage)
    word = jnp.uint4 if format.bits == 4 and format.dtype is not None else jnp.uint8
    return fields if storage == jnp.uint8 else jax.lax.bitcast_convert_type(fields.astype(word), storage)
  codes = fields.astype(jnp.int32)
  codes = 2 * codes - 1 if isinstance(format, formats.Binary) else codes - _offset(format)
  return codes.astype(format.storage)


def _offset(format):
  if isinstance(format, formats.Ternary):
    return 1
  return 2 ** (format.bits - 1) if isinstance(format, formats.Int) and format.signed else 0


def _bit_pattern(codes):
  if codes.dtype == jnp.uint8:
    return codes
  word = jnp.uint4 if codes.dtype == jnp.float4_e2m1fn else jnp.uint8
  return jax.lax.bitcast_convert_type(codes, word).astype(jnp.uint8)


def _width(format, layout):
  """Bits a field: a ternary code takes two of them in a stream."""
  ternary = isinstance(format, formats.Ternary)
  if isinstance(layout, Trits) and not ternary or format.bits > 8:
    raise ValueError(f'pack {format} by {layout}: Trits hold ternary codes, and other layouts codes of at most '
                     f'8 bits, not {format.bits}. Use LowFirst or HighFirst, or store wide floats as they are.')
  return 2 if ternary else format.bits


def _bits(words, order):
  """The bits of each word in `order`: [..., n] -> [..., n * len(order)], uint32."""
  bits = (words.astype(jnp.uint32)[..., None] >> _like(order.astype(np.uint32), words)) & 1
  return bits.reshape(*words.shape[:-1], -1)


def _like(row, x):
  """row[n] with the rank of x, and one axis more."""
  return row.reshape(*(1,) * x.ndim, -1)


def _pad(x, size):
  """[..., n] -> [..., ceil(n / size), size], with zeros."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
  return x.reshape(*x.shape[:-1], -1, size)


def _words(stream, order, width):
  bits = _pad(stream, width)
  words = jnp.sum(bits << _like(order.astype(np.uint32), stream), axis=-1, dtype=jnp.uint32)
  return words.astype(jnp.uint8) if width == 8 else jax.lax.bitcast_convert_type(words, jnp.int32)


def _unsigned(words):
  return words if words.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(words, jnp.uint32)


def _fields(stream, order, count):
  bits = stream[..., :count * len(order)].reshape(*stream.shape[:-1], count, len(order))
  return jnp.sum(bits << _like(order.astype(np.uint32), stream), axis=-1, dtype=jnp.uint32).astype(jnp.uint8)
