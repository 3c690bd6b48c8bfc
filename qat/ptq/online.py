"""Layers whose input is changed before the product reads it: what no layer before them can do.

The inverse of the change goes into the weight, so that the layer's outputs stay. A layer keeps its path, its
Params and its class, of which it becomes an instance of a subclass; quantizers of its input see what was changed.
"""

import functools

from flax import nnx
import jax.numpy as jnp

from qat.core import hadamard, qarray
from qat.ptq import channels


class Divisor(nnx.Variable):
  """What an input is divided by. Not a Param: optimizers leave it alone."""


class Signs(nnx.Variable):
  """1 or -1 for each channel, int8."""


class Divide(nnx.Module):
  """x / s for each channel. On a grid of one scale t, that is the grid of scales s t: no step more when served."""

  def __init__(self, s):
    self.s = Divisor(s)

  def __call__(self, x):
    inverse = qarray.reciprocal(self.s.get_value())                      # Not x / s: the same bits in every program.
    inverse = inverse.reshape((1,) * (x.ndim - 1) + inverse.shape)
    return qarray.cast(qarray.exact(x.astype(jnp.float32) * inverse), x.dtype)


class Hadamard(nnx.Module):
  """x diag(signs) H / sqrt(n), for the Hadamard matrix of core/hadamard.py: n log2 n additions, or little more.

  `signs`: [n] of 1 and -1, or None. `rotation` is hadamard.transform, for which `qat.prepare` puts a device's kernel.
  """

  def __init__(self, signs=None):
    self.signs = None if signs is None else Signs(signs)
    self.rotation = hadamard.transform

  def __call__(self, x):
    return self.rotation(x, None if self.signs is None else self.signs.get_value())


@functools.cache
def online_type(cls):
  """The subclass of a layer class whose instances change their input by `before`, and their output by `after`."""

  class Online(cls):

    def __call__(self, inputs, *args, **kwargs):
      before, after = vars(self).get('before'), vars(self).get('after')
      y = super().__call__(inputs if before is None else before(inputs), *args, **kwargs)
      return y if after is None else after(y)

  Online.__name__ = Online.__qualname__ = f'Online{cls.__name__}'
  return Online


def insert(layer, before, inverse, path):
  """Changes a layer, in place, so that it reads before(x) by the weight inverse(m: f32[*lead, channels, rest])."""
  axes = {nnx.Linear: (-1,), nnx.LinearGeneral: getattr(layer, 'axis', None)}
  kind = next((t for t in axes if isinstance(layer, t)), None)
  if kind is None or axes[kind] != (-1,):
    raise ValueError(f"'{path}', a {type(layer).__name__}, does not read its inputs from the last axis alone. Change "
                     'the inputs of Linear layers, or of LinearGeneral with axis=-1.')
  if hasattr(layer, 'before'):
    raise ValueError(f"'{path}' has an input that is changed already, by {type(layer.before).__name__}. Do it once.")
  channels.map_inputs(layer, inverse, path)
  _make_online(layer)
  layer.before = before


def append(layer, after, inverse, path):
  """Changes a layer, in place, so that it returns after(y).

  Its weight and its bias become inverse(m: f32[*lead, rest, channels]).
  """
  if not isinstance(layer, nnx.Linear):
    raise ValueError(f"'{path}' is a {type(layer).__name__}: outputs are changed of Linear layers. Name one of these.")
  if hasattr(layer, 'after'):
    raise ValueError(f"'{path}' has an output that is changed already, by {type(layer.after).__name__}. Do it once.")
  channels.map_outputs(layer, inverse, path)
  _make_online(layer)
  layer.after = after


def _make_online(layer):
  if not hasattr(layer, 'before') and not hasattr(layer, 'after'):
    layer.__class__ = online_type(type(layer))


class Direction(nnx.Variable):
  """The unit vector along which all channels are equal: 1 / sqrt(n), turned as the stream is. f32[n]."""


class CenteredEmbed(nnx.Embed):
  """An Embed whose rows are looked up without their mean, while a tied head reads them with it."""

  def __call__(self, inputs):
    y = super().__call__(inputs)
    u = self.direction.get_value().astype(y.dtype)
    return y - jnp.einsum('...n,n->...', y, u)[..., None] * u.reshape((1,) * (y.ndim - 1) + u.shape)

  def turn(self, r):
    """Follows a rotation of the embedding, in place."""
    self.direction.set_value(jnp.einsum('n,nm->m', self.direction.get_value(), r, precision='highest'))


def center(embed):
  """Makes an Embed, in place, one that is centered as it is looked up."""
  embed.__class__ = CenteredEmbed
  embed.direction = Direction(jnp.full(embed.features, embed.features ** -0.5))
