"""Blocks: the tile of an array that shares one scale, over its trailing axes.

`None` is a whole axis, leading axes have a scale for each index, and `...` shares the leading
axes too:

    (...,)      one scale          x[..., d]   scale[1, ..., 1]
    (None,)     per token          x[..., d]   scale[..., 1]
    (None, 1)   per out-channel    w[i, o]     scale[1, o]
    (128, 1)    groups of 128      w[i, o]     scale[i/128, o]
    Flat(64)    runs of 64         w[o, i]     scale[ceil(o i / 64)], row after row

A scale has the rank of its array, except under Flat.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Flat:
  """Runs of `size` numbers of the trailing two axes (or the one there is), read row after row.

  The last run may be short. `columns` reads column after column instead: the same runs for a
  kernel [in, out] whose file stores [out, in]. This is how bitsandbytes blocks.
  """
  size: int
  columns: bool = False

  def runs(self, shape):
    """The number of runs in an array of `shape`."""
    return -(-math.prod(shape[-2:]) // self.size)


def tile(block, shape):
  """The block's size along each axis of `shape`."""
  if block and block[0] is Ellipsis:
    block = (None,) * (len(shape) - len(block) + 1) + block[1:]
  lead = len(shape) - len(block)
  if lead < 0:
    raise ValueError(f'Spec.block {block} tiles {len(block)} trailing axes: the array of shape '
                     f'{tuple(shape)} has {len(shape)}. Give the block one entry an axis, or fewer.')
  sizes = (1,) * lead + tuple(d if b is None else b for b, d in zip(block, shape[lead:]))
  for axis, (d, t) in enumerate(zip(shape, sizes)):
    if t and d % t:
      raise ValueError(
          f'Spec.block {block} does not tile shape {tuple(shape)}: axis {axis} has {d} '
          f'elements, not a multiple of {t}. Pad the axis, or pick a divisor of {d}.')
  return sizes


def to_tiles(x, block):
  """Splits `x` into its blocks.

  Args:
    x: [*shape].
    block: a Spec's block.

  Returns:
    [*split], in which each block lies along `axes`, and `axes`. Reducing them with
    keepdims=True gives an array that broadcasts against the split one.
  """
  if isinstance(block, Flat):
    if block.columns:
      x = jnp.swapaxes(x, -1, -2)
    lead, flat = x.shape[:-2], math.prod(x.shape[-2:])
    x = x.reshape(*lead, flat)
    short = -flat % block.size
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, short)], mode='edge')     # Edge: ranges stay the same.
    return x.reshape(*lead, -1, block.size), (len(lead) + 1,)
  split = [n for d, t in zip(x.shape, tile(block, x.shape)) for n in (d // max(t, 1), t)]
  return x.reshape(split), tuple(range(1, 2 * x.ndim, 2))


def from_tiles(x, block, shape):
  """The inverse of `to_tiles`: [*split] -> [*shape]."""
  if not isinstance(block, Flat):
    return x.reshape(shape)
  lead, matrix = shape[:-2], shape[-2:]
  x = x.reshape(*lead, -1)[..., :math.prod(matrix)]
  if block.columns:
    return jnp.swapaxes(x.reshape(*lead, *matrix[::-1]), -1, -2)
  return x.reshape(shape)


def scale_shape(block, shape):
  """The shape of the scales of an array of `shape`."""
  if isinstance(block, Flat):
    return (*shape[:-2], block.runs(shape))
  return tuple(d // max(t, 1) for d, t in zip(shape, tile(block, shape)))


def over_blocks(reduce, x, block):
  """Applies `reduce(x, axis)` to each block: [*shape] -> [*shape / block]."""
  shape = scale_shape(block, x.shape)
  x, axes = to_tiles(x, block)
  return reduce(x, axis=axes).reshape(shape)


def spread(scale, block, shape):
  """Repeats each scale over its block: [*shape / block] -> [*shape]."""
  if isinstance(block, Flat):
    split = (*scale.shape, block.size)
    return from_tiles(jnp.broadcast_to(scale[..., None], split), block, shape)
  split, thin = [], []
  for d, t in zip(shape, tile(block, shape)):
    split += [d // max(t, 1), t]
    thin += [d // max(t, 1), 1]
  return jnp.broadcast_to(scale.reshape(thin), split).reshape(shape)


@functools.partial(jax.jit, static_argnames='axis')  # Else each step is a program, where a range is fitted without jit.
def mean(x, axis):
  """The mean, summed in a fixed order.

  XLA adds up a sum in an order that depends on what it is fused with, so the same numbers can
  get another last bit in another program; additions that are written down one by one cannot.
  """
  count = math.prod(x.shape[a] for a in axis)
  kept = [a for a in range(x.ndim) if a not in axis]
  x = jnp.transpose(x, (*axis, *kept)).reshape(count, *(x.shape[a] for a in kept))
  while len(x) > 1:                                                       # Pairwise: log2(count) steps.
    half = len(x) // 2
    x = jnp.concatenate([x[:half] + x[half:2 * half], x[2 * half:]])
  return x[0] * jnp.asarray(1 / count, x.dtype)
