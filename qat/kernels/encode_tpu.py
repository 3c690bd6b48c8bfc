"""Rows put on a grid on TPU: scale and codes, those of qarray.encode, in one pass over memory."""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray

BLOCK_BYTES = 2**20  # Of float32 in VMEM.
ROWS = 32            # A tile of int8.


def unsupported(x, spec):
  """Why x[*rows, k] is not encoded here, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'the input is {x.dtype}; the kernel reads bfloat16 or float32'
  if spec.block != (None,) or spec.scale is not None or spec.zero is not None:
    return f'{spec} has other scales than one float32 a row'
  if not (isinstance(spec.format, formats.Int) and spec.format.signed and spec.format.bits == 8):
    return f'{spec.format} is not of signed 8-bit integers'
  return None


def encode(x: Float[Array, '*rows k'], spec, interpret=False):
  """qarray.encode(x, spec) with a scale for each row: QArray[*rows, k]."""
  if why := unsupported(x, spec):
    raise NotImplementedError(f'Encoding {x.shape} on {spec} by the TPU kernel: {why}. Use qat.encode.')
  flat = x.reshape(-1, x.shape[-1])
  m, k = flat.shape
  rows = max(BLOCK_BYTES // (4 * k) // ROWS * ROWS, ROWS)
  wide, thin = pl.BlockSpec((rows, k), lambda i: (i, 0)), pl.BlockSpec((rows, 1), lambda i: (i, 0))

  def kernel(x, codes, scale):
    v = x[...].astype(jnp.float32)
    s = qarray.divide(jnp.max(jnp.abs(v), axis=1, keepdims=True), spec.format.max)
    scale[...] = s
    codes[...] = spec.format.round(v * qarray.reciprocal(s)).astype(jnp.int8)

  codes, scale = pl.pallas_call(
      kernel, (jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct((m, 1), jnp.float32)),
      grid=(pl.cdiv(m, rows),), in_specs=[wide], out_specs=(wide, thin), interpret=interpret, name='encode')(flat)
  return qarray.QArray(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1), None, spec)
