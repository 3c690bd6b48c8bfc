"""Round to nearest: what every solver is compared with, and the step that the others repeat.

Sequential solvers round one row of a weight at a time, each after the rows before it. A grid whose scales and zeros
are spread over the array can be cut into rows, and its rows put in any order, whatever the blocks of its Spec are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qat.core import blocks, qarray, ranges


def nearest(w, spec, rule=ranges.absmax):
  """Each number of `w` at the nearest point of its grid.

  Args:
    w: f32[*shape].
    spec: the grid.
    rule: range rule, (x, spec) -> (scale, zero).

  Returns:
    QArray[*shape].
  """
  return qarray.encode(w, spec, *(rule(w, spec) if spec.block is not None else (None, None)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Points:
  """The grid of each number of an array. Invariant: `round` is `qarray.fake`, bit for bit.

  Attributes:
    inverse, scale: f32[*shape].
    zero: likewise, or None where the Spec has none.
    spec: the Spec whose scales and zeros were spread.
  """
  inverse: jax.Array
  scale: jax.Array
  zero: Any
  spec: qarray.Spec = dataclasses.field(metadata=dict(static=True))

  def units(self, x):
    """`x` in units of the format: encoding them gives the codes. f32[*shape] -> f32[*shape]."""
    if self.zero is None:
      return x * self.inverse
    return self.spec.zero.units(x, self.inverse, self.zero, qarray.rounding_.half_even)

  def numbers(self, units):
    """What units decode to, once they are rounded and clipped: f32[*shape] -> f32[*shape]."""
    value = self.spec.format.round(units)
    # exact: what is subtracted from these numbers must see them as they are stored.
    return qarray.exact(value * self.scale if self.zero is None else
                        self.spec.zero.numbers(value, self.scale, self.zero))

  def round(self, x):
    return self.numbers(self.units(x))


def points(scale, zero, spec, shape):
  """The Points of an array of `shape`.

  Args:
    scale, zero: as `qarray.place` returns them: [*shape / block], each f32, a QArray or None.
  """
  if spec.block is None:
    one = jnp.ones(shape)
    return Points(one, one, None, spec)
  scale, zero = qarray.decode(scale), qarray.decode(zero)
  spread = lambda a: blocks.spread(a, spec.block, shape)
  if zero is not None:
    zero = spread(jnp.broadcast_to(zero, scale.shape))
  return Points(spread(qarray.reciprocal(scale)), spread(scale), zero, spec)


def place(w, spec, scale=None, zero=None):
  """`qarray.place`, also for grids that have no scales. A zero gets the shape of the scales."""
  if spec.block is None:
    return None, None
  if zero is not None and not isinstance(zero, qarray.QArray):
    zero = jnp.broadcast_to(zero, blocks.scale_shape(spec.block, w.shape))
  return qarray.place(w, spec, scale, zero)
