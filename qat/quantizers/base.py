"""A quantizer puts an array on a grid, and says what gradient comes back through it."""

import abc

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, qarray


class StepSize(nnx.Param):
  """A learned scale or clip point. Optimizers select it: nnx.state(model, StepSize)."""


class Rounding(nnx.Param):
  """What moves a weight between the levels next to it, one number a weight or more."""


class Range(nnx.Variable):
  """A calibrated scale or zero. Not a Param: optimizers leave it alone."""


class Quantizer(nnx.Module):
  """Abstract. Invariant: decode(self.encode(x)) == self(x), bit for bit.

  A quantizer in a Recipe is a prototype, which holds no state. `for_weight` and `for_input` make
  the quantizer of one operand from it.

  Attributes:
    spec: the grid.
    rule: range rule, (x, spec) -> (scale, zero), for quantizers that fit a weight.
    observer: what watches the batches of `calibrate`; None if this quantizer needs no range.
  """

  spec: qarray.Spec
  observer = None

  @abc.abstractmethod
  def grid(self, x):
    """The scale and zero of each block of `x`: [*shape / block], each f32, QArray or None."""

  @abc.abstractmethod
  def __call__(self, x):
    """The point of the grid that stands for `x` while training: [*shape], of x's dtype."""

  def encode(self, x):
    """The same point, as codes: QArray[*shape]."""
    return qarray.encode(self.prepare(x), self.spec, *self.grid(x))

  def both(self, x):
    """(self(x), self.encode(x)), for products of codes."""
    return self(x), self.encode(jax.lax.stop_gradient(x))

  def prepare(self, x):
    """What is rounded in place of `x`: for methods that squash or clip first."""
    return x

  def for_weight(self, w):
    """The quantizer of the weight w: f32[*lead, in, out]."""
    del w
    return nnx.clone(self)

  def for_input(self, lead, scale=None, zero=None):
    """The quantizer of an activation.

    Args:
      lead: the axes on which nnx.vmap or nnx.scan stacked the layer.
      scale, zero: what the observer found: [*lead] or [*lead, channels], if there is one.
    """
    del lead, scale, zero
    return nnx.clone(self)

  def advance(self):
    """Goes on to the next random draw. Most quantizers draw none."""

  def relaxed(self):
    """What stands in its place while `ptq.reconstruct` trains it: itself, or a form that moves without jumps."""
    return self

  def settled(self):
    """The quantizer of which this is the relaxed form, where that has arrived."""
    return self

  def penalty(self, progress):
    """f32[], what is added to the loss of a reconstruction; `progress` goes from 0 to 1."""
    del progress
    return jnp.float32(0)

  def needs_range(self):
    """The error of a prototype that is called."""
    return ValueError(f'{type(self).__name__}({self.spec}) has no range yet: it is fitted to a weight by quantize, '
                      'and to an activation by calibrate. Call qat.calibrate(model, batches) first.')

  def frozen(self):
    """The quantizer that serves: the same codes, nothing left to learn."""
    return nnx.clone(self)


@jax.custom_jvp
def straight_through(x: Float[Array, '*shape'], x_hat: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """`x_hat`, with the gradient of `x`.

  Not x + stop_gradient(x_hat - x): in bfloat16 that sum leaves the grid.
  """
  return x_hat.astype(x.dtype)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


def to_rank(scale, ndim, block):
  """A stored scale, of shape [] or [channels], at the rank of its array: [1, ..., channels]."""
  if scale is None or isinstance(scale, qarray.QArray) or isinstance(block, blocks.Flat):
    return scale
  return scale.reshape((1,) * (ndim - scale.ndim) + scale.shape)


def each_matrix(f, w):
  """Maps f, a function of a matrix, over w[*lead, in, out]: no range spans two matrices."""
  for _ in range(w.ndim - 2):
    f = jax.vmap(f)
  return f(w)


def inside(x, spec, scale, zero):
  """Where `x` lies within the grid's range and is not clipped: bool[*shape]."""
  u = qarray.units(x, spec, scale, zero)
  return (u >= spec.format.min) & (u <= spec.format.max)
