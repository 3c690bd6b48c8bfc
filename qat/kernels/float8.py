"""Products of 8-bit floats: fp8 operands, float32 sums, scales after. What Hopper, Blackwell and recent TPUs multiply.

Micikevicius et al. FP8 Formats for Deep Learning, 2022, Sec. 3. https://arxiv.org/abs/2209.05433
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, qarray


def fit(x, w):
  """Whether x[*batch, *rows, k] and w[*batch, k, n] are multiplied here."""
  return fits(x, -1) and fits(w, -2)


def fits(q, axis):
  """Whether `q` is made of fp8 that devices have, with a scale that does not change along `axis`, and no zero."""
  spec = q.spec
  if spec.format not in (formats.FP8_E4M3, formats.FP8_E5M2) or not isinstance(spec.block, tuple) or spec.zero:
    return False
  return blocks.scale_shape(spec.block, q.shape)[axis] == 1


def matmul(x: qarray.QArray, w: qarray.QArray) -> Float[Array, '...']:
  """x @ w of two QArrays that fit: one product of codes, then one by the scales.

  Args:
    x: QArray[*batch, *rows, k], with a scale for each row or coarser.
    w: QArray[*batch, k, n], with a scale for each column or coarser.

  Returns:
    f32[*batch, *rows, n].
  """
  batch = w.ndim - 2
  dims = (((x.ndim - 1,), (batch,)), (tuple(range(batch)),) * 2)
  y = jax.lax.dot_general(x.codes, w.codes, dims, preferred_element_type=jnp.float32)
  scale = jnp.squeeze(qarray.decode(w.scale), axis=batch)                # [*batch, n]
  scale = scale.reshape(*scale.shape[:-1], *(1,) * (y.ndim - batch - 1), scale.shape[-1])
  return qarray.exact(y * qarray.decode(x.scale)) * scale
