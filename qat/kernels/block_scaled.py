"""Products of operands with a scale for each 32 or 16 inputs: MXFP8 and NVFP4, which NVIDIA's Blackwell multiplies.

jax.nn.scaled_matmul hands them to cuDNN. Scales multiply within the sum, which is of float32. cuDNN reads a weight
[out, in]: `prepare` turns it around once, and a QArray is turned around at each call.
OCP Microscaling Formats Specification 1.0, 2023, Sec. 5.3.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, qarray, specs
from qat.kernels.prepared import Prepared

LAYOUT = 'gpu-sm100/1'
# (the format of codes, of scales) -> inputs a scale.
GRIDS = {(formats.FP8_E4M3, specs.E8M0.format): 32, (formats.FP8_E5M2, specs.E8M0.format): 32,
         (formats.FP4_E2M1, formats.FP8_E4M3): 16}
BLACKWELL = 10  # Its compute capability, and those after.


def available():
  """Whether the default device of this process multiplies them."""
  capability = getattr(jax.devices()[0], 'compute_capability', None)
  major = (capability or '').split('.')[0]                               # AMD's are such as 'gfx942'.
  return major.isdigit() and int(major) >= BLACKWELL


def fit(x, w):
  """Whether x[*batch, *rows, k] and w[*batch, k, n] are of one grid that the device multiplies."""
  grid = lambda spec: (spec.format, spec.scale.format, spec.scale.block is None)
  return fits(x, -1) and fits(w, -2) and grid(x.spec) == grid(w.spec)


def fits(q, axis):
  """Whether `q` has blocks along `axis` that the device reads, one number wide, under at most one scale a matrix.

  Rows, whose axis is the last, may have one each.
  """
  spec = q.spec
  if spec.scale is None or spec.zero is not None or not isinstance(spec.block, tuple):
    return False
  if spec.scale.zero is not None or spec.scale.block not in (None, (None, None), *[specs.TOKEN] * (axis == -1)):
    return False
  shape = list(q.shape)
  size = GRIDS.get((spec.format, spec.scale.format), math.inf)
  if shape[axis] % size:
    return False
  shape[axis] //= size
  return blocks.scale_shape(spec.block, q.shape) == tuple(shape)


def unsupported(x, w):
  """Why x @ w does not run here, or None. Asks no device.

  Args:
    x: float[m, k] or QArray[m, k].
    w: QArray[k, n] or Prepared; arrays may be shapes only.
  """
  if len(w.shape) != 2:
    return f'the weight of shape {tuple(w.shape)} is no [k, n]'
  if not isinstance(x, qarray.QArray):
    return f'the input is {x.dtype}: both sides have codes here'
  if not fit(x, w):
    return f'{x.spec} does not multiply {w.spec}: both are MXFP8, or both NVFP4, in blocks of inputs'
  return None


@jax.jit
def prepare(q: qarray.QArray) -> Prepared:
  """A weight as cuDNN reads it.

  Args:
    q: QArray[k, n] that fits.

  Returns:
    Prepared with codes [n, k] and scale [n, k / block], in their own types; of NVFP4 also above, the scale of the
    matrix, f32[1, 1].
  """
  if q.ndim != 2 or not fits(q, -2):
    raise NotImplementedError(f'{q.spec} of shape {q.shape} is not prepared for Blackwell: matrices of MXFP8 and NVFP4 '
                              'in blocks of inputs are. Keep the QArray.')
  return Prepared(_turned(q), q.spec, q.shape, LAYOUT)


def _turned(q):
  """The arrays of a Prepared, of a QArray[*batch, k, n]."""
  arrays = {'codes': jnp.swapaxes(q.codes, -1, -2), 'scale': jnp.swapaxes(q.scale.codes, -1, -2)}
  return arrays if q.scale.scale is None else arrays | {'above': qarray.decode(q.scale.scale)}


@functools.partial(jax.jit, static_argnames='dtype')
def decode(p: Prepared, dtype=jnp.float32) -> Float[Array, 'k n']:
  """The numbers of a prepared weight."""
  scale = qarray.QArray(p.arrays['scale'].T, p.arrays.get('above'), None, p.spec.scale)
  return qarray.decode(qarray.QArray(p.arrays['codes'].T, scale, None, p.spec), dtype)


def matmul(x: qarray.QArray, w: qarray.QArray | Prepared) -> Float[Array, '...']:
  """x @ w of two operands of one grid that fit, summed in f32.

  Args:
    x: QArray[*batch, *rows, k].
    w: QArray[*batch, k, n], or Prepared[k, n].

  Returns:
    f32[*batch, *rows, n].
  """
  batch = w.shape[:-2]
  arrays = w.arrays if isinstance(w, Prepared) else _turned(w)           # [*batch, n, k]
  stack = lambda a: a.reshape(math.prod(batch), -1, a.shape[-1])
  y = jax.nn.scaled_matmul(*map(stack, (x.codes, arrays['codes'], x.scale.codes, arrays['scale'])),
                           preferred_element_type=jnp.float32)
  y = y.reshape(*x.shape[:-1], w.shape[-1])
  if x.scale.scale is None:
    return y
  above = arrays['above'].reshape(*batch, *(1,) * (y.ndim - len(batch)))  # One a matrix: [*batch, 1, 1].
  return qarray.exact(y * qarray.decode(x.scale.scale)) * above
