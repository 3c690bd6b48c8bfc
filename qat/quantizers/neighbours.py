"""The two levels next to a number, and grids that have a gradient: what methods that learn to round share.

A level is a value of the format, in the format's units. Where a number lies outside the range, both
neighbours are the end that it is clipped to.
"""

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import blocks, formats, qarray, rounding
from qat.quantizers import base

# Any number is a level: what stands between two levels decodes as these do.
REAL = formats.Float(8, 23, jnp.float32, float(jnp.finfo(jnp.float32).max))


class Offset(nnx.Variable):
  """Whole levels by which codes that were given lie away from the weight. Not a Param: it stays."""


class Neighbours(NamedTuple):
  """Of each number, all [*shape]. Invariant: low <= high, and both are levels."""
  low: jax.Array        # f32, the largest level that is no larger
  high: jax.Array       # f32, the next
  fraction: jax.Array   # f32 in [0, 1], how far the number is from low to high
  up: jax.Array         # bool, whether `high` is the nearest

  nearest = property(lambda self: jnp.where(self.up, self.high, self.low))


def check(what, spec):
  """Raises unless rounding to a neighbour is something to learn on `spec`."""
  if spec.block is None:
    raise ValueError(f'{what}({spec}): its block is None, a format without a scale. Give a block, such as (None, 1) '
                     'for a scale an output.')
  if isinstance(spec.zero, qarray.Zero) and not isinstance(spec.format, formats.Int):
    raise ValueError(f'{what}({spec}): a zero in units of the codes needs integers, and the format is {spec.format}. '
                     'Drop the zero, or use qat.Min.')


def between(x, spec, scale, zero, offset=None):
  """The neighbours of x on its grid: for integers clip(floor(x / s)) and clip(floor(x / s) + 1).

  Args:
    x: float[*shape].
    spec: the grid.
    scale, zero: [*shape / block], each f32, QArray or None.
    offset: f32[*shape], whole levels to add, for integers only.

  Returns:
    Neighbours of [*shape]. A number that is a level is the low one of two integers; in other formats
    it is both.
  """
  u, shift = _units(x, spec, scale, zero)
  format = spec.format
  if isinstance(format, formats.Int):
    whole = jnp.floor(u)
    shift = whole + shift if offset is None else whole + shift + offset
    clamp = lambda level: formats.clamp(level, format.min, format.max)
    return Neighbours(clamp(shift), clamp(shift + 1), u - whole, rounding.half_even(u) > whole)
  if isinstance(format, formats.Binary):
    low, high = jnp.full_like(u, format.min), jnp.full_like(u, format.max)
  else:
    low, high = format.round(u, rounding.floor), format.round(u, rounding.ceil)
  apart = high > low
  gap = jnp.where(apart, high - low, jnp.ones_like(u))
  fraction = jnp.where(apart, jnp.clip((u - low) / gap, 0, 1), jnp.zeros_like(u))
  return Neighbours(low, high, fraction, apart & (format.round(u) == high))


def _units(x, spec, scale, zero):
  """x in units of the codes, before and without a whole zero, and that zero: a sum would lose bits and ties."""
  if not isinstance(spec.zero, qarray.Zero) or spec.zero.format is None:
    return qarray.exact(qarray.units(x, spec, scale, zero)), jnp.float32(0)
  scale, zero = qarray.decode(scale), qarray.decode(zero)
  x = x.astype(jnp.float32)
  zero = blocks.spread(jnp.broadcast_to(zero, scale.shape), spec.block, x.shape)
  return qarray.exact(x * blocks.spread(qarray.reciprocal(scale), spec.block, x.shape)), zero


def offset_to(q, x, reached):
  """The `offset` at which the codes of q, where not `reached`, are the nearest level of x: f32[*shape]."""
  u, shift = _units(x, q.spec, q.scale, q.zero)
  distance = q.spec.format.decode(q.codes) - rounding.half_even(u) - shift
  return jnp.where(reached, jnp.zeros_like(u), distance)


def numbers(value, spec, scale, zero, dtype=jnp.float32):
  """What a value in units of the codes stands for, be it a level or not: dtype[*shape]."""
  return qarray.decode(between_levels(value, spec, scale, zero), dtype)


def between_levels(value, spec, scale, zero):
  """A QArray[*shape] on the grid of `spec` with all that lies between the levels."""
  return qarray.QArray(value, scale, zero, qarray.Spec(REAL, spec.block, spec.scale, spec.zero))


def placed(scale, zero, spec):
  """A learned scale and zero as what they are on their own grids, with straight-through gradients.

  Args:
    scale, zero: f32[*shape / block]; zero may be None.
    spec: the grid.

  Returns:
    the two as f32, and as `encode` takes them (QArrays where they have grids).
  """
  kept = lambda a: None if a is None else jax.lax.stop_gradient(a)
  hard = qarray.place(scale, spec, kept(scale), kept(zero))
  soft = tuple(a if a is None else base.straight_through(a, qarray.decode(h)) for a, h in zip((scale, zero), hard))
  return soft, hard


def on_grid(x, spec, scale, zero):
  """qarray.fake(x, spec, scale, zero) with straight-through gradients by x, scale and zero.

  Rounding is the identity on the way back, and clipping is itself: by x the gradient is 1 within the
  range and 0 beyond; by the scale round(x / s) - x / s within and the level beyond, as LSQ's.

  Args:
    x: float[*shape].
    spec: the grid.
    scale, zero: f32[*shape / block]; zero may be None.
  """
  u = qarray.units(x, spec, scale, zero, straight_half_even)
  inside = (u >= spec.format.min) & (u <= spec.format.max)
  value = jax.lax.stop_gradient(spec.format.round(u))
  value = base.straight_through(jnp.where(inside, u, value), value)
  return numbers(value, spec, scale, zero, x.dtype)


def rescaled(scale, zero, spec, low, high):
  """The scale and zero whose range is [low times its lower end, high times its upper end].

  Args:
    scale, zero: f32[*shape / block], of the whole range; zero may be None.
    spec: the grid.
    low, high: f32[*shape / block], factors. Without a zero, `high` alone counts.

  Returns:
    scale and zero, f32[*shape / block], not on their own grids yet; as given where the factors are 1.
  """
  if zero is None:
    return scale * high, None
  zero = jnp.broadcast_to(zero, scale.shape)
  format = spec.format
  away = -zero if isinstance(spec.zero, qarray.Zero) else zero * qarray.reciprocal(scale)
  bottom, top = (jnp.float32(format.min) + away) * low, (jnp.float32(format.max) + away) * high
  new = scale * qarray.divide(top - bottom, format.max - format.min)
  return new, spec.zero.fit(bottom * scale, new, format)


def straight_half_even(u):
  """Rounding that is the identity on the way back."""
  return base.straight_through(u, rounding.half_even(u))


def over_lead(f, lead):
  """f, a function of matrices' arrays, over `lead` axes before each of them: no range spans two matrices."""
  for _ in range(lead):
    f = jax.vmap(f)
  return f


def floats(lead, *arrays):
  """The f32 of scales or zeros before which there are `lead` axes: QArrays decoded, and None as it is."""
  return tuple(a if a is None else over_lead(qarray.decode, lead)(a) for a in arrays)


def without_params(quantizer):
  """A copy with nothing left to learn: its Params are Ranges."""
  new = nnx.clone(quantizer)
  for name, variable in list(vars(new).items()):
    if isinstance(variable, nnx.Param):
      setattr(new, name, base.Range(variable.get_value()))
  return new


def only_gradient(x):
  """0, with the gradient of x: added to what does not depend on x otherwise."""
  return base.straight_through(x, jnp.zeros_like(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bounded(p, low, high):
  """clip(p, low, high), whose gradient points inwards only once p is out.

  So a step of any optimizer leaves the bounds by one step at most, and comes back: a projection that
  needs no word with the optimizer. A plain clip would have no gradient outside and hold p there.
  """
  return jnp.clip(p, low, high)


def _bounded_backward(low, high, p, g):
  outwards = ((p >= high) & (g < 0)) | ((p <= low) & (g > 0))           # A step goes along -g.
  return (jnp.where(outwards, jnp.zeros_like(g), g),)


bounded.defvjp(lambda p, low, high: (bounded(p, low, high), p), _bounded_backward)
