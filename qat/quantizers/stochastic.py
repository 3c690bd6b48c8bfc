"""Stochastic rounding: up with the probability of the fraction, so that the mean is exact.

Gupta et al. Deep Learning with Limited Numerical Precision, ICML 2015.
https://arxiv.org/abs/1502.02551

The draw is that of the stream's count, so a call and `encode` agree; `advance` goes on to the next, as every
layer does at the end of its call.
"""

from flax import nnx
import jax

from qat.core import qarray, rounding
from qat.quantizers import base, ste, streams


class StochasticRounding(base.Quantizer):

  def __init__(self, spec, rule=qarray.absmax, seed=0):
    self.spec, self.rule = spec, rule
    self.stream = streams.Stream(jax.random.key(seed))

  def grid(self, x):
    return self.rule(x, self.spec)

  def for_weight(self, w):
    return self.for_input(w.shape[:-2])

  def for_input(self, lead, scale=None, zero=None):
    new = nnx.clone(self)
    new.stream = self.stream.stacked(lead)
    return new

  def encode(self, x):
    draw = rounding.Stochastic(self.stream())
    return qarray.encode(x, self.spec, *self.grid(x), rounding=draw)

  def __call__(self, x):
    draw = rounding.Stochastic(self.stream())
    return base.straight_through(x, qarray.fake(x, self.spec, *self.grid(x), rounding=draw))

  def advance(self):
    self.stream.advance()

  def frozen(self):
    """Inputs are rounded to nearest when they are served."""
    return ste.STE(self.spec, self.rule)
