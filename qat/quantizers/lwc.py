"""Learnable weight clipping: learn how far each block's range is shrunk. OmniQuant's LWC.

Shao et al. OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models, ICLR 2024.
https://arxiv.org/abs/2308.13137
Names are the paper's: sigmoid(gamma) and sigmoid(beta) are what max(W) and min(W) are multiplied by (Eq. 2).

Differences from the paper: any format; any range rule gives the range that is shrunk; one factor serves both
ends where there is no zero; the gradient goes straight through the rounding of the zero, which the authors' code stops.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.quantizers import base, neighbours

START = 4.0  # sigmoid(4) = 0.982: the authors' code.


def lwc(w, gamma, beta, spec, scale, zero):
  """clip(round(W / h) + z, 0, 2^N - 1), h and z those of the shrunk range, decoded  (Eq. 2).

  Args:
    w: float[i, o].
    gamma, beta: f32[*blocks]; beta is None without a zero.
    spec: the grid.
    scale, zero: f32[*blocks], of the whole range.

  Returns:
    float[i, o], with straight-through gradients by w, gamma and beta.
  """
  return neighbours.on_grid(w, spec, *shrunk(gamma, beta, spec, scale, zero)[0])


def shrunk(gamma, beta, spec, scale, zero):
  """The scale and the zero of the shrunk range, both as f32 and as `encode` takes them."""
  low, high = (None if a is None else jax.nn.sigmoid(a) for a in (beta, gamma))
  return neighbours.placed(*neighbours.rescaled(scale, zero, spec, low, high), spec)


class LWC(base.Quantizer):

  def __init__(self, spec, rule=qarray.absmax):
    neighbours.check('LWC', spec)
    self.spec, self.rule = spec, rule
    self.gamma, self.beta, self.scale, self.zero = (nnx.data(None) for _ in range(4))

  def for_weight(self, w):
    """Starts from the range times sigmoid(4)."""
    new, ranges = LWC(self.spec, self.rule), base.each_matrix(lambda matrix: self.rule(matrix, self.spec), w)
    scale, zero = neighbours.floats(w.ndim - 2, *ranges)
    new.scale, new.zero = base.Range(scale), None if zero is None else base.Range(zero)
    new.gamma = base.StepSize(jnp.full_like(scale, START))
    new.beta = None if zero is None else base.StepSize(jnp.full_like(scale, START))
    return new

  def _shrunk(self):
    if self.gamma is None:
      raise self.needs_range()
    read = lambda v: None if v is None else v[...]
    return shrunk(self.gamma[...], read(self.beta), self.spec, self.scale[...], read(self.zero))

  def grid(self, x):
    return self._shrunk()[1]

  def __call__(self, x):
    return neighbours.on_grid(x, self.spec, *self._shrunk()[0])

  def frozen(self):
    return neighbours.without_params(self)
