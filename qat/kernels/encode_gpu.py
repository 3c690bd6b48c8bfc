"""Rows put on a grid on NVIDIA's Hopper: scale and codes, those of qarray.encode, in one pass over memory.

A warpgroup holds a row in its registers between the maximum and the codes; XLA has a kernel for the maxima, one for the
scales and one for the codes, and reads x twice.

Both divide by PTX's div.full.f32 and take reciprocals by rcp.approx.f32, of the same numbers. These err by up to 2 and
1 units in the last place (PTX ISA), and are not rounded as IEEE 754 says: scales and codes are XLA's on the same GPU,
and may differ in last bits from those of a CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray
from qat.kernels import pipeline_gpu

THREADS = 128         # Of a warpgroup.
LONGEST = 128         # Channels of a thread, in f32: half of its registers.
LOAD_BYTES = 16       # The most that an instruction loads.


def unsupported(x, spec):
  """Why x[*rows, k] is not encoded here, or None. Asks no device."""
  if why := pipeline_gpu.needs_jax():
    return why
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'the input is {x.dtype}; the kernel reads bfloat16 or float32'
  if spec.block != (None,) or spec.scale is not None or spec.zero is not None:
    return f'{spec} has other scales than one float32 a row'
  integers = isinstance(spec.format, formats.Int) and spec.format.signed and spec.format.bits == 8
  if not integers and spec.format != formats.FP8_E4M3:
    return f'{spec.format} is neither of signed 8-bit integers nor {formats.FP8_E4M3}'
  if x.shape[-1] % THREADS or x.shape[-1] > THREADS * LONGEST:
    return f'{x.shape[-1]} channels are not a multiple of {THREADS}, up to {THREADS * LONGEST}'
  return 'the input is empty' if 0 in x.shape else None


def encode(x: Float[Array, '*rows k'], spec, interpret=False):
  """qarray.encode(x, spec) with a scale for each row: QArray[*rows, k]."""
  if why := unsupported(x, spec):
    raise NotImplementedError(f'Encoding {x.shape} on {spec} by the GPU kernel: {why}. Use qat.encode.')
  codes, scale = _encode(x.reshape(-1, x.shape[-1]), spec.format, pipeline_gpu.params(interpret))
  return qarray.QArray(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1), None, spec)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(x, format, interpret):
  """Codes[m, k] and f32[m, 1]: a block of one warpgroup for each row."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  m, k = x.shape
  run = next(n for n in (8, 4, 2, 1) if n * x.dtype.itemsize <= LOAD_BYTES and k % (THREADS * n) == 0)
  layout = plgpu.Layout.WG_STRIDED((k,), vec_size=run)

  def kernel(x, codes, scale):
    row = jax.lax.axis_index('row')
    v = plgpu.load(x.at[row], layout=layout).astype(jnp.float32)
    s = qarray.divide(jnp.max(jnp.abs(v)), format.max)
    scale[row, 0] = s
    codes[row] = format.encode(v * qarray.reciprocal(s))

  return plgpu.kernel(
      kernel, out_type=(jax.ShapeDtypeStruct((m, k), format.storage), jax.ShapeDtypeStruct((m, 1), jnp.float32)),
      grid=(m,), grid_names=('row',), interpret=interpret, compiler_params=pipeline_gpu.compiler_params())(x)
