"""GGUF's blocks as bytes: QArrays to what a .gguf file stores, and back.

https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. Blocks run along the
last axis: rows are [out, in]. Bytes are little endian, float16s stand beside the codes they
scale, and a byte holds codes that are far apart, so that SIMD registers unpack into runs.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qat.core import packing, specs
from qat.core.qarray import QArray


@dataclasses.dataclass(frozen=True)
class Layout:
  """One block type. `pack` and `unpack` map a QArray's parts, uint8 or f16[blocks, n], to bytes."""
  numbers: int
  size_bytes: int
  pack: Callable
  unpack: Callable


def to_bytes(q):
  """The blocks of a QArray whose spec is in LAYOUTS: uint8[*rows, row_bytes]."""
  layout = _layout(q.spec)
  parts = {k: np.asarray(v).reshape(-1, v.shape[-1] // (q.shape[-1] // layout.numbers))
           for k, v in _parts(q).items()}
  data = np.concatenate(layout.pack(**parts), axis=-1)
  assert data.shape[-1] == layout.size_bytes
  return data.reshape(*q.shape[:-1], -1)


def from_bytes(data, spec, shape):
  """The QArray[*shape] that `to_bytes` made, or llama.cpp."""
  layout = _layout(spec)
  count = int(np.prod(shape)) // layout.numbers
  if data.size != count * layout.size_bytes or shape[-1] % layout.numbers:
    raise ValueError(f'{data.size} bytes for shape {tuple(shape)} of {spec}: a block of {layout.numbers} takes '
                     f'{layout.size_bytes} bytes, so there should be {count * layout.size_bytes}, and rows should '
                     f'divide by {layout.numbers}. Check the shape, which is [out, in], and the type.')
  parts = layout.unpack(np.ascontiguousarray(data).reshape(count, layout.size_bytes))
  return _assemble(spec, {k: v.reshape(*shape[:-1], -1) for k, v in parts.items()})


def _layout(spec):
  if spec not in LAYOUTS:
    raise ValueError(f'GGUF has no block for {spec}. It has those of specs.Q4_0 .. specs.Q6_K, IQ4_NL and '
                     'MXFP4, along rows [out, in]: encode the transpose of a kernel.')
  return LAYOUTS[spec]


def _parts(q):
  """Unsigned codes, d and m (float16), sc and mn (the sub-blocks' integers): arrays by name."""
  parts = dict(codes=packing.to_fields(q.codes, q.spec.format))
  for inner, outer, a in (('sc', 'd', q.scale), ('mn', 'm', q.zero)):
    if a is None:
      continue
    if a.spec.block is not None:
      parts[inner], a = packing.to_fields(a.codes, a.spec.format), a.scale
    parts[outer] = a.codes
  if 'mn' in parts:
    parts['m'] = -parts['m']                                             # x = d sc q - m mn
  return parts


def _assemble(spec, parts):
  """The inverse of `_parts`."""
  parts = {k: jnp.asarray(v) for k, v in parts.items()}

  def nested(spec, inner, outer):
    if spec.block is None:
      return QArray(outer, None, None, spec)
    return QArray(packing.from_fields(inner, spec.format), QArray(outer, None, None, spec.scale), None, spec)

  scale, zero = nested(spec.scale, parts.get('sc'), parts['d']), None
  if 'm' in parts:
    m = -parts['m'] if 'mn' in parts else parts['m']
    zero = nested(spec.zero.spec, parts.get('mn'), m)
  return QArray(packing.from_fields(parts['codes'], spec.format), scale, zero, spec)


def _join(fields, bits):
  """Fields [blocks, ..., k, n] that share bytes [blocks, ... * n], field k at bit k * bits."""
  shifts = np.arange(fields.shape[-2], dtype=np.uint8)[:, None] * np.uint8(bits)
  return np.bitwise_or.reduce((fields & np.uint8(2**bits - 1)) << shifts, axis=-2).reshape(len(fields), -1)


def _split(data, bits, k, n):
  """The inverse of `_join`: [blocks, bytes] -> [blocks, ..., k, n]."""
  shifts = np.arange(k, dtype=np.uint8)[:, None] * np.uint8(bits)
  return (data.reshape(len(data), -1, 1, n) >> shifts) & np.uint8(2**bits - 1)


def _cut(data, *sizes):
  return np.split(data, np.cumsum(sizes)[:-1], axis=-1)


def _f16(data):
  return np.ascontiguousarray(data).view('<f2')


def _bytes(a):
  """float16s as little-endian bytes."""
  return a.astype('<f2').view(np.uint8)


def _nibbles():
  """Q4_0, Q4_1, IQ4_NL: code j low and code j + 16 high in byte j."""
  pack = lambda codes: _join(codes.reshape(-1, 2, 16), 4)
  return pack, lambda qs: _split(qs, 4, 2, 16).reshape(len(qs), -1)


def _fives():
  """Q5_0, Q5_1: the fifth bits of the 32 codes, then the nibbles."""
  pack4, unpack4 = _nibbles()

  def pack(codes):
    return np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder='little'), pack4(codes)], -1)

  def unpack(data):
    high, low = _cut(data, 4, 16)
    return unpack4(low) | np.unpackbits(high, axis=-1, bitorder='little') << 4

  return pack, unpack


def _simple(codes, minimum):
  """float16 d (and m), then the codes: `codes` is the pair (pack, unpack)."""
  pack, unpack = codes

  def read(data):
    d, *m, qs = _cut(data, *[2] * (1 + minimum), data.shape[-1] - 2 * (1 + minimum))
    return dict(codes=unpack(qs), d=_f16(d)) | (dict(m=_f16(m[0])) if m else {})

  return lambda codes, d, **m: [_bytes(d), *map(_bytes, m.values()), pack(codes)], read


def _q8_0():
  flip = lambda codes: codes ^ np.uint8(128)                             # Offset to two's complement.
  return _simple((flip, flip), minimum=False)


def _mxfp4():
  pack, unpack = _nibbles()

  def read(data):
    e, qs = _cut(data, 1, 16)
    return dict(codes=unpack(qs), d=e.view(ml_dtypes.float8_e8m0fnu))

  return lambda codes, d: [d.view(np.uint8), pack(codes)], read


def _q2_k():
  def write(codes, sc, mn, d, m):
    return [sc | mn << 4, _join(codes.reshape(-1, 2, 4, 32), 2), _bytes(d), _bytes(m)]

  def read(data):
    scales, qs, d, m = _cut(data, 16, 64, 2, 2)
    codes = _split(qs, 2, 4, 32).reshape(len(data), -1)
    return dict(codes=codes, sc=scales & 15, mn=scales >> 4, d=_f16(d), m=_f16(m))

  return write, read


def _q3_k():
  def write(codes, sc, d):
    high = _join((codes >> 2).reshape(-1, 8, 32), 1)
    low_scales = _join((sc & 15).reshape(-1, 2, 8), 4)
    high_scales = _join((sc >> 4).reshape(-1, 4, 4), 2)
    return [high, _join(codes.reshape(-1, 2, 4, 32), 2), low_scales, high_scales, _bytes(d)]

  def read(data):
    hmask, qs, low, high, d = _cut(data, 32, 64, 8, 4, 2)
    codes = _split(qs, 2, 4, 32).reshape(len(data), -1) | _split(hmask, 1, 8, 32).reshape(len(data), -1) << 2
    sc = _split(low, 4, 2, 8).reshape(len(data), -1) | _split(high, 2, 4, 4).reshape(len(data), -1) << 4
    return dict(codes=codes, sc=sc, d=_f16(d))

  return write, read


def _six_bit_pairs(sc, mn):
  """K4's 12 bytes: sc[:4] and mn[:4] with the high bits of sc[4:] and mn[4:], then their low nibbles."""
  return np.concatenate([sc[:, :4] | sc[:, 4:] >> 4 << 6, mn[:, :4] | mn[:, 4:] >> 4 << 6,
                         sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4], -1)


def _six_bit_pairs_back(data):
  a, b, low = _cut(data, 4, 4, 4)
  sc = np.concatenate([a & 63, low & 15 | a >> 6 << 4], -1)
  return sc, np.concatenate([b & 63, low >> 4 | b >> 6 << 4], -1)


def _q4_k():
  def write(codes, sc, mn, d, m):
    return [_bytes(d), _bytes(m), _six_bit_pairs(sc, mn), _join(codes.reshape(-1, 4, 2, 32), 4)]

  def read(data):
    d, m, scales, qs = _cut(data, 2, 2, 12, 128)
    sc, mn = _six_bit_pairs_back(scales)
    return dict(codes=_split(qs, 4, 2, 32).reshape(len(data), -1), sc=sc, mn=mn, d=_f16(d), m=_f16(m))

  return write, read


def _q5_k():
  def write(codes, sc, mn, d, m):
    high = _join((codes >> 4).reshape(-1, 8, 32), 1)
    return [_bytes(d), _bytes(m), _six_bit_pairs(sc, mn), high, _join(codes.reshape(-1, 4, 2, 32), 4)]

  def read(data):
    d, m, scales, qh, qs = _cut(data, 2, 2, 12, 32, 128)
    sc, mn = _six_bit_pairs_back(scales)
    codes = _split(qs, 4, 2, 32).reshape(len(data), -1) | _split(qh, 1, 8, 32).reshape(len(data), -1) << 4
    return dict(codes=codes, sc=sc, mn=mn, d=_f16(d), m=_f16(m))

  return write, read


def _q6_k():
  def write(codes, sc, d):
    # ql: code 128 h + 64 hi + 32 p + l in nibble hi of byte 64 h + 32 p + l.
    low = _join(codes.reshape(-1, 2, 2, 64), 4)
    high = _join((codes >> 4).reshape(-1, 2, 4, 32), 2)
    return [low, high, sc ^ np.uint8(128), _bytes(d)]

  def read(data):
    ql, qh, scales, d = _cut(data, 128, 64, 16, 2)
    codes = _split(ql, 4, 2, 64).reshape(len(data), -1) | _split(qh, 2, 4, 32).reshape(len(data), -1) << 4
    return dict(codes=codes, sc=scales ^ np.uint8(128), d=_f16(d))

  return write, read


LAYOUTS = {
    specs.Q4_0: Layout(32, 18, *_simple(_nibbles(), minimum=False)),
    specs.Q4_1: Layout(32, 20, *_simple(_nibbles(), minimum=True)),
    specs.Q5_0: Layout(32, 22, *_simple(_fives(), minimum=False)),
    specs.Q5_1: Layout(32, 24, *_simple(_fives(), minimum=True)),
    specs.Q8_0: Layout(32, 34, *_q8_0()),
    specs.IQ4_NL: Layout(32, 18, *_simple(_nibbles(), minimum=False)),
    specs.MXFP4: Layout(32, 17, *_mxfp4()),
    specs.Q2_K: Layout(256, 84, *_q2_k()),
    specs.Q3_K: Layout(256, 110, *_q3_k()),
    specs.Q4_K: Layout(256, 144, *_q4_k()),
    specs.Q5_K: Layout(256, 176, *_q5_k()),
    specs.Q6_K: Layout(256, 210, *_q6_k())}
