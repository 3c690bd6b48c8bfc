"""The form in which kernels read a cache of attention: codes, and a scale and a zero for each token of each head.

Scales of a QArray[h, t, d] are [h, t, 1]. Here they are rows, since a TPU pads the last axis to 128.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, qarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Keys, or values, of t tokens.

  Attributes:
    codes: [h, t, d], in the format's storage type.
    scale: f32[h, 1, t].
    zero: f32[h, 1, t], or None.
    format: of the codes.
    kind: qarray.Zero or qarray.Min, what `zero` is; None if there is none.
  """
  codes: Any  # Also shapes only: a pytree.
  scale: Any
  zero: Any
  format: formats.Format = dataclasses.field(metadata=dict(static=True))
  kind: qarray.Zero | qarray.Min | None = dataclasses.field(metadata=dict(static=True))

  shape = property(lambda self: self.codes.shape)

  @property
  def offset(self):
    """What is added to codes * scale: f32[h, 1, t], or None."""
    return -self.zero * self.scale if isinstance(self.kind, qarray.Zero) else self.zero

  def write(self, new, start):
    """With the tokens of `new` from `start` on."""
    put = lambda held, part, axis: jax.lax.dynamic_update_slice_in_dim(held, part, start, axis)
    return dataclasses.replace(self, codes=put(self.codes, new.codes, 1), scale=put(self.scale, new.scale, 2),
                               zero=None if self.zero is None else put(self.zero, new.zero, 2))


def unsupported(spec, shape):
  """Why a QArray[h, t, d] has no Tokens, or None."""
  if len(shape) != 3:
    return f'an array of shape {tuple(shape)} is no [heads, tokens, d]'
  if not isinstance(spec.format, formats.Int | formats.Float):
    return f'{spec} has a codebook'
  if not isinstance(spec.block, tuple) or blocks.scale_shape(spec.block, shape) != (*shape[:2], 1):
    return f'{spec} has not one scale a token'
  return None


def of(q: qarray.QArray) -> Tokens:
  """The Tokens of a QArray[h, t, d]; a ValueError where there are none."""
  if why := unsupported(q.spec, q.shape):
    raise ValueError(f'A cache of attention on codes: {why}. Encode keys and values [heads, tokens, d] with '
                     'Spec(format, (None,)).')
  row = lambda a: None if a is None else jnp.swapaxes(qarray.decode(a), 1, 2)
  codes, zero, format, kind = q.codes, row(q.zero), q.spec.format, q.spec.zero
  if isinstance(format, formats.Int) and isinstance(kind, qarray.Zero) and kind.format == format and format.min == 0:
    format = formats.Int(format.bits)                                    # codes - zero stays, and int4 takes 4 bits.
    codes, zero = (codes.astype(jnp.int32) + int(format.min)).astype(format.storage), zero + jnp.float32(format.min)
  return Tokens(codes, row(q.scale), zero, format, kind)


def decode(tokens: Tokens) -> Float[Array, 'h t d']:
  """The numbers, those of the QArray to the bit."""
  value = tokens.format.decode(tokens.codes)
  scale, zero = (None if a is None else jnp.swapaxes(a, 1, 2) for a in (tokens.scale, tokens.zero))
  return qarray.exact(value * scale) if zero is None else tokens.kind.numbers(value, scale, zero)
