"""The form in which kernels read a weight: codes, and a scale and an offset for each group of inputs and each output.

w[k, n] = value(codes[k, n]) scale[k // g, n] + offset[k // g, n], where value is the format's. Then, with groups as a
batch axis,

    x @ w = sum over groups of scale (x_g @ value(codes_g)) + offset sum(x_g),

so that no number of w is ever made. A zero point is the offset -zero scale; a minimum is an offset as it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qat.core import blocks, formats, qarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
  """A weight [k, n] in groups of k / G inputs.

  Attributes:
    codes: [k, n], in the format's storage type.
    scale: f32[G, n].
    offset: f32[G, n], or None.
    format: of the codes.
  """
  codes: Array
  scale: Float[Array, 'G n']
  offset: Float[Array, 'G n'] | None
  format: formats.Format = dataclasses.field(metadata=dict(static=True))

  shape = property(lambda self: self.codes.shape)
  size = property(lambda self: self.codes.shape[0] // self.scale.shape[0])  # Of a group.


def group_size(spec, shape):
  """How many inputs share a scale in an array [*lead, k, n] of `spec`, or why none do: an int or a str."""
  k = shape[-2]
  if spec.block is None:
    return k
  if isinstance(spec.block, blocks.Flat):
    if not spec.block.columns:
      return f'{spec.block} runs along the outputs, so that a scale is no factor of a sum over inputs'
    if k % spec.block.size:
      return f'runs of {spec.block.size} go on from one output to the next: an output has {k} inputs'
    return spec.block.size
  if spec.block[0] is Ellipsis and len(shape) > 2:
    return f'the block {spec.block} shares a scale between matrices'
  return blocks.tile(spec.block, shape)[-2]


def of(q: qarray.QArray) -> Groups:
  """The Groups of a QArray[k, n]; a ValueError where scales are no factors of sums over inputs."""
  size = group_size(q.spec, q.shape)
  if isinstance(size, str):
    raise ValueError(f'A weight of {q.spec} and shape {q.shape} has no groups of inputs: {size}. '
                     'Multiply by its decoded numbers.')
  k, n = q.shape
  if q.spec.block is None:
    return Groups(q.codes, jnp.ones((1, n), jnp.float32), None, q.spec.format)
  scale = _spread(qarray.decode(q.scale), q.spec, (k, n))
  if q.zero is None:
    return Groups(q.codes, scale, None, q.spec.format)
  zero = _spread(jnp.broadcast_to(qarray.decode(q.zero), q.scale.shape), q.spec, (k, n))
  offset = zero if isinstance(q.spec.zero, qarray.Min) else -qarray.exact(zero * scale)
  return Groups(q.codes, scale, offset, q.spec.format)


def _spread(scale, spec, shape):
  """[*shape / block] -> f32[G, n]."""
  k, n = shape
  if isinstance(spec.block, blocks.Flat):                                # Column after column.
    return scale.reshape(n, -1).T
  g, b = blocks.tile(spec.block, shape)
  return jnp.repeat(scale, b, axis=-1, total_repeat_length=n) if b > 1 else scale


def sums(x: Shaped[Array, '*m k'], size: int) -> Float[Array, '*m G']:
  """The sum of each group of inputs, in f32."""
  *m, k = x.shape
  return jnp.sum(x.astype(jnp.float32).reshape(*m, k // size, size), axis=-1)
