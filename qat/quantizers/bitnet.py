"""BitNet b1.58: ternary weights, and inputs in 8 bits a token.

Ma et al. The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024.
https://arxiv.org/abs/2402.17764. W_hat = RoundClip(W / gamma, -1, 1) gamma, gamma = mean|W| (Eqs. 1-3).

Difference from the paper: no epsilon; a matrix of zeros has scale zero. The norm that the authors put
before each linear layer belongs to the model.
"""

from qat.core import formats, qarray, ranges
from qat.quantizers import ste


def weight():
  """The straight-through quantizer of a kernel: one gamma for the matrix."""
  return ste.STE(qarray.Spec(formats.TERNARY, (None, None)), ranges.absmean)


def input():
  """Symmetric int8 with the absolute maximum of each token (Sec. 2)."""
  return ste.STE(qarray.Spec(formats.INT8_NARROW, (None,)))
