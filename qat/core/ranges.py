"""Range rules: which scale, and which zero, an array gets.

A rule is a function `rule(x, spec) -> (scale, zero)` of float[*shape] and a grid with a block;
both results are [*shape / block] and on their own grids, ready for `qarray.encode`; zero is None
where the grid has none. Rules with parameters are frozen dataclasses, and so hash and compare.

    absmax           max|x| / format.max, or (max - min) / (levels - 1): clips nothing
    midrange         max|x| / ((format.max - format.min) / 2): int4's / 7.5
    signed_extreme   the element of largest |x|, with its sign, / format.min
    Percentile       keeps a share of the numbers in range
    Search           the least |x - x_hat|^p over shrunken ranges
    Entropy          the least KL divergence between the numbers and their grid
    ocp_floor, ocp_ceil, ocp_even   powers of two under the elements of microscaling formats
    centered         scales quantized around their mean: bitsandbytes' double quantization
    lsq_init         2 mean|x| / sqrt(format.max)
    absmean          mean|x|
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import blocks, formats, histograms, qarray

absmax = qarray.absmax


def midrange(x, spec):
  """2 max|x| / (format.max - format.min): the largest number lands half a step past the top code.

  compressed-tensors' and torchao's symmetric integers (int4: max|x| / 7.5). On numbers without
  outliers it is 0.9 dB better than max|x| / 7.
  """
  _symmetric('midrange', spec)
  high = blocks.over_blocks(jnp.max, jnp.abs(x.astype(jnp.float32)), spec.block)
  scale = qarray.divide(high, (spec.format.max - spec.format.min) / 2)
  return qarray.place(x, spec, scale)


def signed_extreme(x, spec):
  """The element of largest |x|, with its sign, over format.min: that element is exact.

  GGUF's Q4_0, Q5_0 and IQ4_NL (ggml-quants.c), whose scales may be negative. Of equals the first.
  """
  _symmetric('signed_extreme', spec)
  if spec.scale is not None and spec.scale.format.min >= 0:
    raise ValueError(f'signed_extreme on {spec}: half of its scales are negative, and {spec.scale.format} '
                     f'starts at {spec.scale.format.min}. Use absmax, or Search.')
  scale = qarray.divide(blocks.over_blocks(extreme, x.astype(jnp.float32), spec.block), spec.format.min)
  return qarray.place(x, spec, scale)


def lsq_init(x, spec):
  """2 mean|v| / sqrt(Q_P), where LSQ's learned step starts.

  Esser et al. Learned Step Size Quantization, ICLR 2020, Sec. 2.1. https://arxiv.org/abs/1902.08153
  """
  _symmetric('lsq_init', spec)
  mean = blocks.over_blocks(blocks.mean, jnp.abs(x.astype(jnp.float32)), spec.block)
  return qarray.place(x, spec, lsq_step(mean, spec.format))


def lsq_step(mean, format):
  """The same, from the mean of |v|: f32[*s] -> f32[*s]."""
  return mean * jnp.float32(2 / math.sqrt(format.max))


def absmean(x, spec):
  """mean|x|. Ma et al. The Era of 1-bit LLMs, 2024, Eq. (3). https://arxiv.org/abs/2402.17764

  The paper adds an epsilon to it; here a scale of 0 gives codes of 0.
  """
  _symmetric('absmean', spec)
  return qarray.place(x, spec, blocks.over_blocks(blocks.mean, jnp.abs(x.astype(jnp.float32)), spec.block))


@dataclasses.dataclass(frozen=True)
class Percentile:
  """Keeps `percent` % of each block in range: of |x|, or a half of the rest is cut at each end.

  The ends are elements of x (no interpolation), chosen so that at least that share is kept.
  """
  percent: float = 99.9

  def __post_init__(self):
    check_percent(self)

  def __call__(self, x, spec):
    x = x.astype(jnp.float32)
    if is_symmetric(spec):
      reduce = lambda a, axis: _order(a, axis, self.percent / 100, math.ceil)
      high = blocks.over_blocks(reduce, jnp.abs(x), spec.block)
      return qarray.from_range(-high, high, spec)
    cut = (1 - self.percent / 100) / 2
    low = blocks.over_blocks(lambda a, axis: _order(a, axis, cut, math.floor), x, spec.block)
    high = blocks.over_blocks(lambda a, axis: _order(a, axis, 1 - cut, math.ceil), x, spec.block)
    return qarray.from_range(low, high, spec)


@dataclasses.dataclass(frozen=True)
class Search:
  """The range with the least sum |x - x_hat|^p in each block, among r absmax, lowest <= r <= 1.

  `steps` ratios in equal steps from 1 down. p = 2.4 and 100 steps to 0.2 are GPTQ's (its
  `mse=True`), p = 2.4 BRECQ's for activations. Scales above scales stay those of r = 1.
  With an `importance`, which broadcasts to x, the sum is of importance |x - x_hat|^p.
  """
  p: float = 2.0
  lowest: float = 0.2
  steps: int = 81

  def __call__(self, x, spec, importance=None):
    x = x.astype(jnp.float32)
    low, high = extent(x, spec)
    first = qarray.from_range(low, high, spec)

    def error(r):
      scale, zero = qarray.from_range(*shrink(low, high, r, spec), spec, under=first)
      wrong = self.distance(x - qarray.exact(qarray.fake(x, spec, scale, zero)))
      wrong = wrong if importance is None else qarray.exact(wrong * importance)
      return blocks.over_blocks(blocks.mean, wrong, spec.block)

    r = self.best(error, low.shape)
    return qarray.from_range(*shrink(low, high, r, spec), spec, under=first)

  def distance(self, wrong):
    """|wrong|^p."""
    return qarray.exact(wrong * wrong if self.p == 2 else jnp.abs(wrong) ** self.p)

  def best(self, error, shape):
    """The r of the least error(r), each f32[*shape]; of equals the largest r."""

    def step(best, r):
      ratio, least = best
      now = error(jnp.broadcast_to(r, shape))
      return (jnp.where(now < least, r, ratio), jnp.minimum(now, least)), None

    start = jnp.ones(shape), jnp.full(shape, jnp.inf)
    ratios = np.linspace(1, self.lowest, self.steps, dtype=np.float32)
    (ratio, _), _ = jax.lax.scan(step, start, ratios)
    return ratio


@dataclasses.dataclass(frozen=True)
class Entropy:
  """The clipping threshold on |x| at which x and its `levels` bins diverge least.

  Migacz. 8-bit Inference with TensorRT, GTC 2017, slides 38-40: see histograms.least_divergence.
  Per tensor: 2048 bins need many numbers.
  """
  bins: int = 2048
  levels: int = 128

  def __call__(self, x, spec):
    x = x.astype(jnp.float32)
    low, high = extent(x, dataclasses.replace(spec, zero=qarray.Zero()))
    if low.size != 1:
      raise ValueError(f'Entropy on {spec}: shape {x.shape} has {low.size} blocks, and a histogram of '
                       f'{self.bins} bins describes one. Use the block (...,), or another rule.')
    top = jnp.maximum(-low, high)
    counts = histograms.count(x, top.reshape(()), self.bins)
    limit = histograms.least_divergence(counts.sum(0), self.levels) * qarray.divide(top, self.bins)
    return qarray.from_range(jnp.maximum(low, -limit), jnp.minimum(high, limit), spec)


def ocp_floor(x, spec):
  """2^(floor(log2 max|x|) - emax), the exponent shared by a block. OCP MX 1.0, Sec. 6.3.

  emax is the exponent of the format's largest number: 2 for E2M1, 8 for E4M3. Numbers above
  2^floor(...) format.max / 2^emax saturate. GGUF's MXFP4.
  """
  return _shared_exponent(_amax_bits(x, spec), x, spec)


def ocp_ceil(x, spec):
  """2^(ceil(log2 max|x|) - emax). It clips nothing, and may waste the top code (torchao's CEIL).

  The smallest power of two that clips nothing, 2^ceil(log2(max|x| / max)), is `absmax` (RCEIL).
  """
  return _shared_exponent(_amax_bits(x, spec) + (2**23 - 1), x, spec)


def ocp_even(x, spec):
  """2^(floor(log2 r) - emax), where r is max|x| rounded half up to the format's mantissa.

  torchao's EVEN, and compressed-tensors' rounding: 3.5 counts as 4 under E2M1, not as 2 + 1.5.
  """
  fraction = spec.format.mantissa if isinstance(spec.format, formats.Float) else spec.format.bits - 2
  return _shared_exponent(_amax_bits(x, spec) + 2 ** (22 - fraction), x, spec)


def _amax_bits(x, spec):
  """The f32 bits of each block's max|x|: i32[*shape / block]."""
  high = blocks.over_blocks(jnp.max, jnp.abs(x.astype(jnp.float32)), spec.block)
  return jax.lax.bitcast_convert_type(high, jnp.int32)


def _shared_exponent(bits, x, spec):
  """2^(the exponent field of `bits` - emax), on the grid of the scales."""
  _symmetric('A shared exponent', spec)
  emax = math.floor(math.log2(spec.format.max))
  field = jnp.clip((bits >> 23) - emax, 1, 254)                          # 2^-126 .. 2^127
  return qarray.place(x, spec, jax.lax.bitcast_convert_type(field << 23, jnp.float32))


def centered(x, spec):
  """max|x| scales, quantized as offsets from their mean. For specs.NF4_DQ.

  Dettmers et al. QLoRA, NeurIPS 2023, Sec. 3. https://arxiv.org/abs/2305.14314, as bitsandbytes
  does it: one mean for the array, then the largest |scale - mean| of each block of scales.
  """
  if spec.scale is None or not isinstance(spec.scale.zero, qarray.Min):
    raise ValueError(f'centered on {spec}: its scales have no Min to hold their mean. '
                     'Use a grid such as specs.NF4_DQ.')
  _symmetric('centered', spec)
  plain = dataclasses.replace(spec, scale=None)
  scale, _ = qarray.absmax(x, plain)                                     # [*shape / block]
  mean = scale_mean(scale, spec.scale.block)
  largest = blocks.over_blocks(jnp.max, jnp.abs(scale - mean), spec.scale.block)
  outer = qarray.divide(largest, spec.scale.format.max)
  return qarray.encode(scale, spec.scale, outer, mean), None


def scale_mean(scale, block):
  """The mean of the trailing axes that `block` tiles, which stay as axes of 1."""
  axes = (scale.ndim - 1,) if isinstance(block, blocks.Flat) else tuple(range(scale.ndim))
  kept = [1 if a in axes else n for a, n in enumerate(scale.shape)]
  return blocks.mean(scale, axes).reshape(kept)


def is_symmetric(spec):
  """Whether the grid reaches as far below zero as above, and no zero moves it."""
  return spec.zero is None and spec.format.min < 0


def extent(x, spec):
  """The least and the largest number of each block; those of |x| for a symmetric grid."""
  if is_symmetric(spec):
    high = blocks.over_blocks(jnp.max, jnp.abs(x), spec.block)
    return -high, high
  return blocks.over_blocks(jnp.min, x, spec.block), blocks.over_blocks(jnp.max, x, spec.block)


def shrink(low, high, r, spec):
  """The range times r: towards 0, or towards its middle where a Min need not hold 0."""
  if not isinstance(spec.zero, qarray.Min):
    return low * r, high * r
  cut = qarray.exact((high - low) * (1 - r) * 0.5)
  return low + cut, high - cut


def check_percent(rule):
  if not 0 < rule.percent <= 100:
    raise ValueError(f'{rule}: {rule.percent} % of the numbers cannot be kept. Give a percentage in '
                     '(0, 100]; 99.9 is usual.')


def _symmetric(rule, spec):
  if not is_symmetric(spec):
    raise ValueError(f'{rule} on {spec}: the rule needs a signed format without a zero. '
                     'Use absmax, Percentile or Search.')


def rows(x, axis):
  """[*shape] -> [*kept, n], with the reduced axes merged in order."""
  kept = [a for a in range(x.ndim) if a not in axis]
  return jnp.transpose(x, (*kept, *axis)).reshape(*(x.shape[a] for a in kept), -1)


def extreme(x, axis):
  """The element of largest |x|, with its sign; of equals the first."""
  x = rows(x, axis)
  return jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), -1, keepdims=True), -1)[..., 0]


def _order(x, axis, share, whole):
  """The element that stands at `share` of the way from the least to the largest."""
  x = rows(x, axis)
  # 1e-9: the share is a decimal fraction, as 0.999 * 1000 = 999.0000000000001.
  slack = -1e-9 if whole is math.ceil else 1e-9
  return jnp.sort(x, -1)[..., whole(share * (x.shape[-1] - 1) + slack)]
