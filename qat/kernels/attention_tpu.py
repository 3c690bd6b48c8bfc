"""Decoding attention over a cache in codes on TPU, with the online softmax of FlashAttention.

Dao et al. FlashAttention, NeurIPS 2022, Alg. 1. https://arxiv.org/abs/2205.14135. A grid step reads a run of tokens of
one head's keys and values; a running maximum, sum and output stay in VMEM. The query and the probabilities are
multiplied in bfloat16.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray
from qat.kernels import attention_xla

LANES = 128
TOKENS = 512  # Of a grid step.


def unsupported(query, keys, values):
  """Why this kernel does not run, or None."""
  if why := attention_xla.unsupported(query, keys, values):
    return why
  for cache in (keys, values):
    if isinstance(cache.format, formats.Float) and cache.format.dtype is None:
      return f'{cache.format} has no type on TPU'
  if keys.shape[1] % LANES or keys.shape[2] % LANES:
    return f'keys of shape {keys.shape} are not of whole tiles of {LANES} tokens by {LANES}'
  return None


def decode(query: Float[Array, 'h g d'], keys, values, length, interpret=False) -> Float[Array, 'h g d']:
  """attention_xla.decode(query, keys, values, length)."""
  if why := unsupported(query, keys, values):
    raise NotImplementedError(f'Attention over a cache in codes by the TPU kernel: {why}. Use attention_xla.decode.')
  (h, g, d), t = query.shape, keys.shape[1]
  run = next(r for r in (TOKENS, 256, LANES) if t % r == 0)
  group = -(-g // 16) * 16                                               # A tile of bfloat16.
  q = (query.astype(jnp.float32) * jnp.float32(d**-0.5)).astype(jnp.bfloat16)
  q = jnp.pad(q, ((0, 0), (0, group - g), (0, 0)))
  cache, places = [], []
  of_head = pl.BlockSpec((None, group, d), lambda i, j, n: (i, 0, 0))
  of_tokens = pl.BlockSpec((None, run, d), lambda i, j, n: (i, j, 0))
  of_scales = pl.BlockSpec((None, 1, run), lambda i, j, n: (i, 0, j))
  for part in (keys, values):
    rows = [part.scale] if part.zero is None else [part.scale, part.offset]
    cache += [part.codes, *rows]
    places += [of_tokens] + [of_scales] * len(rows)
  offsets = keys.zero is not None, values.zero is not None
  y = pl.pallas_call(
      functools.partial(_kernel, run, offsets), jax.ShapeDtypeStruct((h, group, d), jnp.float32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(h, t // run), in_specs=[of_head, *places], out_specs=of_head,
          scratch_shapes=[pltpu.VMEM((group, LANES), jnp.float32)] * 2 + [pltpu.VMEM((group, d), jnp.float32)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')), interpret=interpret,
      name='attention')(jnp.asarray(length, jnp.int32).reshape(1), q, *cache)
  return qarray.cast(y[:, :g], query.dtype)


def _kernel(run, offsets, length, q, *refs):
  *cache, y, most, total, out = refs
  keys, key_scale, key_offset = _taken(cache, offsets[0])
  values, value_scale, value_offset = _taken(cache, offsets[1])
  j = pl.program_id(1)

  @pl.when(j == 0)
  def _():
    most[...] = jnp.full_like(most, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    out[...] = jnp.zeros_like(out)

  @pl.when(j * run < length[0])
  def _():
    scores = jax.lax.dot_general(q[...], keys[...].astype(jnp.bfloat16), (((1,), (1,)), ((), ())),
                                 preferred_element_type=jnp.float32) * key_scale[...]
    if key_offset is not None:
      scores += jnp.sum(q[...].astype(jnp.float32), axis=1, keepdims=True) * key_offset[...]
    token = j * run + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(token < length[0], scores, -jnp.inf)
    before = most[:, :1]
    m = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    p, shrink = jnp.exp(scores - m), jnp.exp(before - m)
    most[...] = jnp.broadcast_to(m, most.shape)
    total[...] = total[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
    weighted = jnp.dot((p * value_scale[...]).astype(jnp.bfloat16), values[...].astype(jnp.bfloat16),
                       preferred_element_type=jnp.float32)
    if value_offset is not None:
      weighted += jnp.sum(p * value_offset[...], axis=1, keepdims=True)
    out[...] = out[...] * shrink + weighted

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    y[...] = out[...] / total[:, :1]


def _taken(cache, has_offset):
  """Codes, scales and offsets, or None, from the front of the references."""
  codes, scale = cache.pop(0), cache.pop(0)
  return codes, scale, cache.pop(0) if has_offset else None
