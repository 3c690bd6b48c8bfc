"""Bits and bytes that a model takes: counted from its shapes, and measured on its packed codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import formats, packing, qarray
from qat.nn import explain


@dataclasses.dataclass(frozen=True)
class Size:
  """What the quantized weights of a model take, with their scales and zeros.

  Attributes:
    weights: how many there are; those that layers share count once.
    stored_bytes: path -> bytes, packed.
  """
  weights: int
  stored_bytes: dict

  @property
  def quantized_bytes(self):
    return sum(self.stored_bytes.values())

  @property
  def bits_per_weight(self):
    """Of the quantized weights."""
    return 8 * self.quantized_bytes / self.weights


def to_bytes(q):
  """The codes, scales and zeros of an array, packed with no gap but the last byte's of each.

  Args:
    q: QArray[*shape]; a plain array is stored as it is.

  Returns:
    bytes.

  >>> from qat.core import specs
  >>> len(to_bytes(qarray.encode(jnp.ones((64, 3)), specs.integer(4, (32, 1)))))   # 192 codes / 2 + 6 scales * 4
  120
  """
  if q is None:
    return b''
  if not isinstance(q, qarray.QArray):
    return np.asarray(q).tobytes()
  format, codes = q.spec.format, jnp.ravel(q.codes)
  if format.bits > 8:
    words = codes
  else:
    words = _pack(codes, format, packing.Trits() if isinstance(format, formats.Ternary) else packing.LowFirst())
  return np.asarray(words).tobytes() + to_bytes(q.scale) + to_bytes(q.zero)


_pack = jax.jit(packing.pack, static_argnums=(1, 2))  # One program a shape: its bits as int32 are never whole.


def measure(model):
  """The Size of a quantized or frozen model: each weight is encoded and packed."""
  found = explain.quantized_weights(model)
  if not found:
    raise ValueError('The model has no quantized weight: there are no codes to pack. '
                     'Give what qat.quantize or qat.freeze returned.')
  return Size(sum(q.size for _, q in found.values()), {path: len(to_bytes(q)) for path, (_, q) in found.items()})
