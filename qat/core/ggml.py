"""GGUF's block formats as ggml encodes them: the codes that llama.cpp's quantizer would choose.

https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c

The simple formats choose codes with an f32 scale and store it as f16; `encode` of the same Spec
chooses them with the scale that is stored, and so loses a little less. The K-quants and IQ4_NL
search scales by weighted least squares; here the sums have another order than in C, so that a
few codes differ, and the scales of a super-block are rounded under its f16 scale.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import blocks, formats, qarray, ranges, rounding, specs
from qat.core.qarray import QArray


def encode(x, spec):
  """ggml's codes and scales for x: float[*shape] -> QArray[*shape].

  Args:
    x: the array.
    spec: one of specs.Q4_0 .. specs.Q6_K, IQ4_NL and MXFP4, or its `specs.kernel`.
  """
  if spec not in ENCODERS:
    raise ValueError(f'ggml has no encoder for {spec}. It encodes the grids of specs.py named '
                     f'{", ".join(NAMES)}, and their kernels; use qarray.encode for others.')
  return ENCODERS[spec](x.astype(jnp.float32), spec)


def from_extreme(x, spec):
  """Q4_0, Q5_0: d = (the element of largest |x|) / -2^(b-1); q = trunc(x / d + 2^(b-1) + 1/2)."""
  d = qarray.divide(blocks.over_blocks(ranges.extreme, x, spec.block), spec.format.min)
  u = qarray.exact(x * _spread(qarray.reciprocal(d), x, spec)) + (0.5 - spec.format.min)
  codes = jnp.clip(jnp.trunc(u) + spec.format.min, spec.format.min, spec.format.max)
  return QArray(spec.format.encode(codes), *qarray.place(x, spec, d), spec)


def from_minimum(x, spec):
  """Q4_1, Q5_1: m = min x, d = (max x - m) / (2^b - 1); q = trunc((x - m) / d + 1/2)."""
  low, high = ranges.extent(x, spec)
  d = qarray.divide(high - low, spec.format.max)
  u = qarray.exact((x - _spread(low, x, spec)) * _spread(qarray.reciprocal(d), x, spec)) + 0.5
  codes = jnp.clip(jnp.trunc(u), 0, spec.format.max)
  return QArray(spec.format.encode(codes), *qarray.place(x, spec, d, low), spec)


def from_largest(x, spec):
  """Q8_0: d = max|x| / 127; q = round(x / d), halves away from zero."""
  d = qarray.divide(blocks.over_blocks(jnp.max, jnp.abs(x), spec.block), spec.format.max)
  codes = spec.format.encode(x * _spread(qarray.reciprocal(d), x, spec), rounding.half_away)
  return QArray(codes, *qarray.place(x, spec, d), spec)


def mxfp4(x, spec):
  """MXFP4: the floor of the shared exponent; of two nearest levels the one nearer to zero, and no -0."""
  scale, _ = ranges.ocp_floor(x, spec)
  u = x * _spread(qarray.reciprocal(qarray.decode(scale)), x, spec)
  nearest = formats.Codebook(tuple(v for v in spec.format.levels() if v >= 0)).round(jnp.abs(u))
  codes = spec.format.encode(jnp.where((u < 0) & (nearest > 0), -nearest, nearest))
  # A block of zeros has the exponent 2^-127, whose code is 0.
  empty = blocks.over_blocks(jnp.max, jnp.abs(x), spec.block) == 0
  bits = jnp.where(empty, 0, jax.lax.bitcast_convert_type(scale.codes, jnp.uint8))
  exponents = jax.lax.bitcast_convert_type(bits, scale.codes.dtype)
  return QArray(codes, dataclasses.replace(scale, codes=exponents), None, spec)


@dataclasses.dataclass(frozen=True)
class SignedSearch:
  """A range rule for signed codes: try scales around the signed extreme, and refit each.

  For each step t: q = round(x (format.min + t) / extreme); scale = sum w x q / sum w q^2, w = x^2;
  the best has the largest (sum w x q)^2 / sum w q^2. ggml's make_qx_quants (Q6_K, Q3_K) and
  quantize_row_iq4_nl_impl.
  """
  steps: tuple

  def __call__(self, x, spec):
    rows = _rows(x, spec)                                                # f32[..., n]
    extreme = ranges.extreme(rows, (rows.ndim - 1,))[..., None]
    inverse, w = qarray.reciprocal(extreme), rows * rows

    def step(best, t):
      scale, most = best
      q = spec.format.round(rows * ((spec.format.min + t) * inverse))
      along, norm = _sum(w * q * rows), _sum(w * q * q)
      now = along * along * qarray.reciprocal(norm)
      return (jnp.where(now > most, along * qarray.reciprocal(norm), scale), jnp.maximum(now, most)), None

    start = jnp.zeros_like(extreme), jnp.zeros_like(extreme)
    (scale, _), _ = jax.lax.scan(step, start, np.float32(self.steps))
    scale = scale.reshape(blocks.scale_shape(spec.block, x.shape))
    if spec.scale.block is not None:
      scale = qarray.encode(scale, spec.scale, ranges.signed_extreme(scale, spec.scale)[0])
    return qarray.place(x, spec, scale)


@dataclasses.dataclass(frozen=True)
class MinimumSearch:
  """A range rule for scales > 0 and minimums <= 0: try steps, and refit both by least squares.

  For each t: q = round((x - min) (t + 2^b - 1) / (max - min)); scale and min solve
  min sum w (scale q + min - x)^2. ggml's make_qkx2_quants (Q2_K, Q4_K, Q5_K). `weight` is a
  function of rows f32[..., n], `distance` of the differences.
  """
  first: float
  count: int
  weight: object
  distance: object

  def __call__(self, x, spec):
    rows = _rows(x, spec)                                                # f32[..., n]
    w, largest = self.weight(rows), spec.format.max
    low = jnp.minimum(jnp.min(rows, -1, keepdims=True), 0)
    high = jnp.max(rows, -1, keepdims=True)
    total, total_x = _sum(w), _sum(w * rows)
    error = lambda q, scale, low: _sum(w * self.distance(qarray.exact(scale * q) + low - rows))

    def codes(t, low):
      inverse = (t + largest) * qarray.reciprocal(high - low)
      return jnp.clip(jnp.round(inverse * (rows - low)), 0, largest)

    def step(best, t):
      least, scale, low = best
      q = codes(t, low)
      s1, s2, sx = _sum(w * q), _sum(w * q * q), _sum(w * q * rows)
      D = qarray.exact(total * s2) - qarray.exact(s1 * s1)
      new_scale = (qarray.exact(total * sx) - qarray.exact(total_x * s1)) * qarray.reciprocal(D)
      new_low = (qarray.exact(s2 * total_x) - qarray.exact(s1 * sx)) * qarray.reciprocal(D)
      new_scale = jnp.where(new_low > 0, sx * qarray.reciprocal(s2), new_scale)
      new_low = jnp.minimum(new_low, 0)
      now = error(q, new_scale, new_low)
      better = (D > 0) & (now < least)
      return tuple(jnp.where(better, a, b) for a, b in
                   zip((now, new_scale, new_low), (least, scale, low))), None

    scale = qarray.divide(high - low, largest)
    start = error(codes(0.0, low), scale, low), scale, low
    steps = np.float32(self.first) + np.float32(0.1) * np.arange(self.count + 1, dtype=np.float32)
    (_, scale, low), _ = jax.lax.scan(step, start, steps)
    shape = blocks.scale_shape(spec.block, x.shape)
    return qarray.place(x, spec, scale.reshape(shape), low.reshape(shape))


def _searched(rule):
  return lambda x, spec: qarray.encode(x, spec, *rule(x, spec))


def _sum(x):
  """Over the last axis, which stays, in a fixed order: f32[..., n] -> f32[..., 1]."""
  return blocks.mean(qarray.exact(x), (x.ndim - 1,))[..., None] * x.shape[-1]


def _rows(x, spec):
  """Each block as a row: [*shape] -> [..., n]."""
  return ranges.rows(*blocks.to_tiles(x.astype(jnp.float32), spec.block))


def _spread(scale, x, spec):
  return blocks.spread(scale, spec.block, x.shape)


def _deviation(rows):
  """sqrt(mean x^2) + |x|: Q4_K's and Q5_K's weights."""
  return jnp.sqrt(_sum(rows * rows) * (1 / rows.shape[-1])) + jnp.abs(rows)


def _square(x):
  return x * x


q2_k = MinimumSearch(-0.5, 15, jnp.abs, jnp.abs)
q4_k = MinimumSearch(-1.0, 20, _deviation, _square)
q5_k = MinimumSearch(-0.5, 15, _deviation, _square)
q6_k = SignedSearch((0.0, *(0.1 * k for k in range(-9, 10) if k)))
# IQ4_NL's levels are not symmetric: extremes of either sign are tried on the longer side first.
iq4_nl = SignedSearch((254.0, *range(-7, 8)))

NAMES = {
    'Q4_0': from_extreme, 'Q5_0': from_extreme, 'Q4_1': from_minimum, 'Q5_1': from_minimum, 'Q8_0': from_largest,
    'MXFP4': mxfp4, 'IQ4_NL': _searched(iq4_nl), 'Q2_K': _searched(q2_k), 'Q3_K': _searched(q6_k),
    'Q4_K': _searched(q4_k), 'Q5_K': _searched(q5_k), 'Q6_K': _searched(q6_k)}
ENCODERS = {s: f for n, f in NAMES.items() for s in (getattr(specs, n), specs.kernel(getattr(specs, n)))}
