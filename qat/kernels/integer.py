"""Integer matrix products: int8 operands, int32 sums, scales after.

Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, CVPR 2018, Sec. 2.2-2.3. https://arxiv.org/abs/1712.05877
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray


def fit(x, w):
  """Whether x[*batch, *rows, k] and w[*batch, k, n] are multiplied here."""
  return fits(x, -1) and fits(w, -2)


def fits(q, axis):
  """Whether `q` is made of integers whose scale, and zero, do not change along `axis`."""
  spec = q.spec
  if not isinstance(spec.format, (formats.Int, formats.Binary)) or spec.block is None:
    return False
  whole = spec.zero is None or (isinstance(spec.zero, qarray.Zero) and spec.zero.format is not None)
  scale = qarray.decode(q.scale)
  return whole and scale.ndim == q.ndim and scale.shape[axis] == 1


def matmul(x: qarray.QArray, w: qarray.QArray) -> Float[Array, '...']:
  """x @ w of two integer QArrays: exact in int32, then one product by the scales.

  Args:
    x: QArray[*batch, *rows, k], with a scale for each row or coarser.
    w: QArray[*batch, k, n], with a scale for each column or coarser.

  Returns:
    f32[*batch, *rows, n].
  """
  batch = w.ndim - 2
  a, a_zero = int8(x)
  b, b_zero = int8(w)
  dims = (((a.ndim - 1,), (batch,)), (tuple(range(batch)),) * 2)
  y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)
  # (a - za)(b - zb) summed over k = ab - za sum(b) - zb sum(a) + k za zb, all whole numbers.
  rows = y.ndim - batch - 1
  columns = lambda v: v.reshape(*v.shape[:batch], *(1,) * rows, v.shape[-1])
  if a_zero is not None:
    y = y - a_zero * columns(jnp.sum(b, axis=batch, dtype=jnp.int32))
  if b_zero is not None:
    b_zero = columns(jnp.squeeze(b_zero, axis=batch))
    y = y - b_zero * jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32)
    if a_zero is not None:
      y = y + a.shape[-1] * a_zero * b_zero
  scale = columns(jnp.squeeze(qarray.decode(w.scale), axis=batch))
  return qarray.exact(y.astype(jnp.float32) * qarray.decode(x.scale) * scale)


def int8(q):
  """Codes as int8, and what to take from each as i32, or None. Unsigned 8 bits move down by 128."""
  codes, zero = q.codes, None
  if q.zero is not None:
    zero = qarray.decode(q.zero).astype(jnp.int32)
  if codes.dtype == jnp.uint8 and q.spec.format.bits == 8:
    codes = (codes.astype(jnp.int32) - 128).astype(jnp.int8)
    zero = (jnp.zeros((1,) * q.ndim, jnp.int32) if zero is None else zero) - 128
  if zero is not None:
    zero = jnp.broadcast_to(zero, qarray.decode(q.scale).shape)
  return codes.astype(jnp.int8), zero
