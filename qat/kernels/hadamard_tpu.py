"""The Hadamard rotation of core/hadamard.py on TPU: one pass over memory.

H_n = H_m (x) H_j (x) H_128, for n = 128 j m: runs of 128 lanes are multiplied by H_128 on the MXU, where entries of 1
and -1 are exact in bfloat16, and then added to and taken from each other, log2(j) times, and once by H_m.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qat.core import hadamard

LANES, MOST_RUNS, MOST_CORE = 128, 128, 12
BLOCK_BYTES = 2**20  # Of float32 in VMEM.


def unsupported(x):
  """Why the last axis of x is not rotated here, or None."""
  n = x.shape[-1]
  if n % LANES or (n // LANES) > MOST_RUNS:
    return f'{n} channels are not 1 to {MOST_RUNS} runs of {LANES} lanes'
  m = hadamard.core_order(n)
  if m > MOST_CORE or n // m < LANES:
    return f'a Hadamard matrix of order {n} has a core of order {m}; the kernel adds up cores of {MOST_CORE} or less'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'the input is {x.dtype}, and neither bfloat16 nor float32'
  return None


def transform(x: Float[Array, '*rows n'], interpret=False) -> Float[Array, '*rows n']:
  """x H / sqrt(n) along the last axis, summed in float32, in the dtype of x."""
  if why := unsupported(x):
    raise NotImplementedError(f'A rotation of {x.shape} by the TPU kernel: {why}. Use core.hadamard.transform.')
  n = x.shape[-1]
  flat = x.reshape(-1, n)
  rows = max(min(BLOCK_BYTES // (4 * n) // 16 * 16, -(-flat.shape[0] // 16) * 16), 16)
  block = pl.BlockSpec((rows, n), lambda i: (i, 0))
  lanes = jnp.asarray(hadamard.matrix(LANES), x.dtype)
  y = pl.pallas_call(
      functools.partial(_kernel, hadamard.core_order(n)), jax.ShapeDtypeStruct(flat.shape, x.dtype),
      grid=(pl.cdiv(flat.shape[0], rows),), in_specs=[block, pl.BlockSpec((LANES, LANES), lambda i: (0, 0))],
      out_specs=block, interpret=interpret, name='hadamard')(flat, lanes)
  return y.reshape(x.shape)


def _kernel(m, x, lanes, y):
  n = x.shape[1]
  high = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  runs = [jnp.dot(x[:, i:i + LANES], lanes[...], preferred_element_type=jnp.float32, precision=high)
          for i in range(0, n, LANES)]
  j = n // LANES // m
  parts = [_walsh(runs[a * j:(a + 1) * j]) for a in range(m)]            # m of j runs.
  core = np.asarray(hadamard.matrix(m))
  for c in range(m):
    for i in range(j):
      total = _signed_sum([(core[a, c], parts[a][i]) for a in range(m)])
      at = (c * j + i) * LANES
      y[:, at:at + LANES] = (total * jnp.float32(1 / math.sqrt(n))).astype(y.dtype)


def _walsh(runs):
  """Sylvester's butterflies over a list of arrays."""
  half = 1
  while half < len(runs):
    for start in range(0, len(runs), 2 * half):
      for i in range(start, start + half):
        runs[i], runs[i + half] = runs[i] + runs[i + half], runs[i] - runs[i + half]
    half *= 2
  return runs


def _signed_sum(terms):
  sign, total = terms[0]
  total = total if sign > 0 else -total
  for sign, term in terms[1:]:
    total = total + term if sign > 0 else total - term
  return total
