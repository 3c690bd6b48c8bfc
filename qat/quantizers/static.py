"""Static quantization: a range that calibration fixed, and the clipped straight-through gradient.

Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, CVPR 2018. https://arxiv.org/abs/1712.05877

Difference from the paper: ranges are fitted before training and stay; there is no moving average
while training.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import observers, qarray
from qat.quantizers import base

MIN_MAX = observers.MinMax()


@jax.custom_jvp
def clipped_straight_through(x, x_hat, is_inside):
  """`x_hat`, with the gradient of clip(x): 1 inside the range and 0 where x was clipped."""
  del is_inside
  return x_hat.astype(x.dtype)


@clipped_straight_through.defjvp
def _jvp(primals, tangents):
  return clipped_straight_through(*primals), jnp.where(primals[2], tangents[0], jnp.zeros_like(tangents[0]))


class Static(base.Quantizer):

  def __init__(self, spec, rule=qarray.absmax, observer=MIN_MAX, unsigned=None):
    """`unsigned`: the Spec to use instead if calibration sees no negative number."""
    self.spec, self.rule, self.observer, self.unsigned = spec, rule, observer, unsigned
    self.scale, self.zero = nnx.data(None), nnx.data(None)

  @classmethod
  def at(cls, spec, scale, zero=None):
    """A quantizer whose range is known: scale [] or [channels], or as `encode` takes it."""
    self = cls(spec, observer=None)
    self.scale = base.Range(scale)
    self.zero = None if zero is None else base.Range(zero)
    return self

  def with_spec(self, spec):
    return Static(spec, self.rule, self.observer)

  def grid(self, x):
    if self.scale is None:
      raise self.needs_range()
    read = lambda v: None if v is None else base.to_rank(v.get_value(), x.ndim, self.spec.block)
    return read(self.scale), read(self.zero)

  def __call__(self, x):
    scale, zero = self.grid(x)
    x_hat = qarray.fake(x, self.spec, scale, zero)
    return clipped_straight_through(x, x_hat, base.inside(x, self.spec, scale, zero))

  def for_weight(self, w):
    return Static.at(self.spec, *base.each_matrix(lambda matrix: self.rule(matrix, self.spec), w))

  def for_input(self, lead, scale=None, zero=None):
    return Static.at(self.spec, scale, zero)
