"""Weights rearranged for one kernel: made once, from canonical codes, and never written to a file."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from qat.core import qarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
  """A weight in a kernel's own layout.

  Attributes:
    arrays: {name: array}, what the kernel reads.
    spec: the grid of the QArray it was made from.
    shape: [*lead, k, n], of that QArray.
    layout: which kernel's, and its version, such as 'gpu-sm90/1'.
  """
  arrays: Any
  spec: qarray.Spec = dataclasses.field(metadata=dict(static=True))
  shape: tuple = dataclasses.field(metadata=dict(static=True))
  layout: str = dataclasses.field(metadata=dict(static=True))

  ndim = property(lambda self: len(self.shape))
  size = property(lambda self: math.prod(self.shape))
  target = property(lambda self: self.layout.split('/')[0].split('-')[0])  # 'gpu', 'tpu' or 'cpu'.

  @property
  def nbits(self):
    """Bits of memory on an accelerator, where int4 takes 4."""
    return sum(a.size * bits(a.dtype) for a in self.arrays.values())


def bits(dtype):
  """Of a number of a dtype: 4 of int4."""
  info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
  return info(dtype).bits
