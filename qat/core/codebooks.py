"""Named codebooks: the non-uniform grids that others published."""

import numpy as np
import scipy.special

from qat.core.formats import Codebook


def normal_float(bits):
  """NormalFloat-k: levels at equal steps of the normal's quantiles, with an exact zero.

  Dettmers et al. QLoRA, NeurIPS 2023, Sec. 3 and Appendix E. https://arxiv.org/abs/2305.14314
  The outermost quantile, 0.9677083, is the mean of 1 - 1/(2 * 15) and 1 - 1/(2 * 16). There is one
  positive level more than negative ones.
  """
  half = 2 ** (bits - 1)
  positive = scipy.special.ndtri(np.linspace(0.9677083, 0.5, half + 1)[:-1])
  negative = -scipy.special.ndtri(np.linspace(0.9677083, 0.5, half)[:-1])
  levels = np.sort(np.concatenate([positive, [0.0], negative]))
  return Codebook(tuple((levels / levels.max()).astype(np.float32).tolist()), f'NF{bits}')


def power_of_two(bits, lowest=None):
  """{0} and +-2^-k: multiplication is a shift.

  Miyashita et al. Convolutional Neural Networks using Logarithmic Data Representation, 2016.
  https://arxiv.org/abs/1603.01025. 2^bits - 1 levels, k = 0 .. 2^(bits-1) - 2, or to -`lowest`.
  """
  last = 2 ** (bits - 1) - 2 if lowest is None else -lowest
  positive = [2.0**-k for k in range(last, -1, -1)]
  return Codebook((*(-v for v in reversed(positive)), 0.0, *positive), f'POT{bits}')


def dynamic(exponents=7, signed=True):
  """The dynamic map of 8-bit optimizers and of double quantization.

  Dettmers et al. 8-bit Optimizers via Block-wise Quantization, ICLR 2022, Sec. 1.3 and 2.2.
  https://arxiv.org/abs/2110.02861. For i = 0 .. exponents - 1 the means of neighbours in
  linspace(0.1, 1, 2^i + 1), times 10^(i - exponents + 1); both signs, 0 and 1:
  2 (2^exponents - 1) + 2 = 256 levels. Without the sign there are 2^(i + 1) means in its place. In float32, as
  bitsandbytes computes its maps.
  """
  positive = []
  for i in range(exponents):
    edges = _linspace(2 ** (i if signed else i + 1) + 1)
    means = (edges[:-1] + edges[1:]) / np.float32(2)
    positive += (np.float32(10.0 ** (i - exponents + 1)) * means).tolist()
  negative = [-v for v in positive] if signed else []
  values = np.sort(np.asarray([*negative, 0.0, *positive, 1.0], np.float32))
  return Codebook(tuple(values.tolist()), f'DYNAMIC{exponents + 1}' + '_UNSIGNED' * (not signed))


def _linspace(count):
  """linspace(0.1, 1, count) in float32 as torch computes it, to the bit: fused steps from the nearer end."""
  first, last, i = np.float32(0.1), np.float32(1), np.arange(count)
  step = np.float64((last - first) / np.float32(count - 1))
  return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


# QLoRA, Appendix E, as bitsandbytes stores it (its quantiles were computed in other precision).
NF4 = Codebook((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0), 'NF4')
NF3, NF2 = normal_float(3), normal_float(2)

# bitsandbytes' FP4, which is not OCP's E2M1: .0052 where E2M1 / 6 has .0833.
FP4_BNB = Codebook(tuple(np.float32(np.array(
    [-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12).tolist()), 'FP4_BNB')

# ggml-common.h, kvalues_iq4nl.
IQ4_NL = Codebook((-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
                   1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0), 'IQ4_NL')

DYNAMIC8, DYNAMIC8_UNSIGNED = dynamic(), dynamic(signed=False)
