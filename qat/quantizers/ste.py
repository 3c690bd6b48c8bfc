"""Straight-through estimator: on the way back, rounding is the identity.

Bengio, Leonard, Courville. Estimating or Propagating Gradients Through Stochastic Neurons
for Conditional Computation, 2013. https://arxiv.org/abs/1308.3432

The range is found anew for each array ("dynamic"), by a rule that clips nothing unless another is
given. Numbers that the rule does clip get the straight-through gradient as well.
"""

import jax

from qat.core import qarray
from qat.quantizers import base


class STE(base.Quantizer):

  def __init__(self, spec, rule=qarray.absmax):
    self.spec, self.rule = spec, rule

  def grid(self, x):
    return self.rule(x, self.spec)

  def __call__(self, x):
    v = jax.lax.stop_gradient(x)
    return base.straight_through(x, qarray.fake(v, self.spec, *self.grid(v)))

  def both(self, x):
    codes = self.encode(jax.lax.stop_gradient(x))
    return base.straight_through(x, qarray.decode(codes, x.dtype)), codes
