"""Products of operands with a scale for each 32 or 16 inputs: MXFP8 and NVFP4, which NVIDIA's Blackwell multiplies.

jax.nn.scaled_matmul hands them to cuDNN. Scales multiply within the sum, which is of float32.
OCP Microscaling Formats Specification 1.0, 2023, Sec. 5.3.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, qarray, specs

# (the format of codes, of scales) -> inputs a scale.
GRIDS = {(formats.FP8_E4M3, specs.E8M0.format): 32, (formats.FP8_E5M2, specs.E8M0.format): 32,
         (formats.FP4_E2M1, formats.FP8_E4M3): 16}
BLACKWELL = 10  # Its compute capability, and those after.


def available():
  """Whether the default device of this process multiplies them."""
  capability = getattr(jax.devices()[0], 'compute_capability', None)
  return capability is not None and float(capability) >= BLACKWELL


def fit(x, w):
  """Whether x[*batch, *rows, k] and w[*batch, k, n] are of one grid that the device multiplies."""
  grid = lambda spec: (spec.format, spec.scale.format, spec.scale.block)
  return fits(x, -1) and fits(w, -2) and grid(x.spec) == grid(w.spec)


def fits(q, axis):
  """Whether `q` has blocks along `axis` that the device reads, one number wide, and at most one scale above them."""
  spec = q.spec
  if spec.scale is None or spec.zero is not None or not isinstance(spec.block, tuple):
    return False
  if spec.scale.zero is not None or spec.scale.block not in (None, (None, None)):
    return False
  shape = list(q.shape)
  size = GRIDS.get((spec.format, spec.scale.format), math.inf)
  if shape[axis] % size:
    return False
  shape[axis] //= size
  return blocks.scale_shape(spec.block, q.shape) == tuple(shape)


def matmul(x: qarray.QArray, w: qarray.QArray) -> Float[Array, '...']:
  """x @ w of two QArrays of one grid that fit, summed in f32.

  Args:
    x: QArray[*batch, *rows, k].
    w: QArray[*batch, k, n].

  Returns:
    f32[*batch, *rows, n].
  """
  batch = w.shape[:-2]
  count = math.prod(batch)
  rows = lambda a: a.reshape(count, -1, a.shape[-1])
  columns = lambda a: rows(jnp.swapaxes(a, -1, -2))                      # [*batch, k, n] -> [count, n, k]
  y = jax.nn.scaled_matmul(rows(x.codes), columns(w.codes), rows(x.scale.codes), columns(w.scale.codes),
                           preferred_element_type=jnp.float32)
  y = y.reshape(*x.shape[:-1], w.shape[-1])
  if x.scale.scale is None:
    return y
  above = qarray.decode(w.scale.scale)                                   # One a matrix: [*batch, 1, 1].
  above = above.reshape(*batch, *(1,) * (y.ndim - len(batch)))
  return qarray.exact(y * qarray.decode(x.scale.scale)) * above
