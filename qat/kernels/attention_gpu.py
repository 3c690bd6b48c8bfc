"""Decoding attention over a cache in codes on NVIDIA's Hopper, with the online softmax of FlashAttention.

Dao et al. FlashAttention, NeurIPS 2022, Alg. 1. https://arxiv.org/abs/2205.14135. Tokens are split between blocks, as
in Flash-Decoding (Dao et al. 2023), and between the two warpgroups of one; XLA weighs what each found. Codes become
bf16 in shared memory, without their scales, which multiply scores and probabilities. The heads of a group are padded to
the 64 rows that wgmma takes at least.

All of the cache is read, and what lies beyond `length` is masked.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import qarray
from qat.kernels import attention_xla, pipeline_gpu, prepared
from qat.kernels.tiles_gpu import PROCESSORS, WARPGROUPS

ROWS, TOKENS, STAGES = 64, 64, 2   # Heads of a group; tokens of a warpgroup's step.
MASKED = -1e30                     # As -inf, but exp2(MASKED - MASKED) is a number.


def unsupported(query, keys, values):
  """Why this kernel does not run, or None. Asks no device."""
  if why := pipeline_gpu.needs_jax() or attention_xla.unsupported(query, keys, values):
    return why
  if any(c.codes.dtype not in (jnp.int4, jnp.int8, jnp.uint8) for c in (keys, values)):
    return f'the cache is of {keys.codes.dtype} and {values.codes.dtype}; the kernel reads int4, int8 and uint8'
  if keys.shape[1] % (WARPGROUPS * TOKENS) or keys.shape[2] not in (64, 128):
    return f'keys of shape {keys.shape} are not of whole {WARPGROUPS * TOKENS} tokens by 64 or 128'
  if query.shape[1] > ROWS or query.dtype != jnp.bfloat16:
    return f'the query is {query.dtype}{query.shape}; the kernel takes bfloat16, and {ROWS} heads a group or fewer'
  return None


def decode(query: Float[Array, 'h g d'], keys, values, length, interpret=False) -> Float[Array, 'h g d']:
  """attention_xla.decode(query, keys, values, length)."""
  if why := unsupported(query, keys, values):
    raise NotImplementedError(f'Attention over a cache in codes by the GPU kernel: {why}. Use attention_xla.decode.')
  return _decode(query, keys, values, length, pipeline_gpu.params(interpret))


@functools.partial(jax.jit, static_argnums=4)
def _decode(query, keys, values, length, interpret):
  (h, g, d), t = query.shape, keys.shape[1]
  scores_in_base_2 = d**-0.5 * math.log2(math.e)
  q = jnp.pad((query.astype(jnp.float32) * scores_in_base_2).astype(jnp.bfloat16), ((0, 0), (0, ROWS - g), (0, 0)))
  mask = jnp.where(jnp.arange(t)[None] < length, 0.0, MASKED).astype(jnp.float32)
  steps, heads = t // (WARPGROUPS * TOKENS), -(-g // 8) * 8              # What is written of the 64 rows.
  splits = max((s for s in range(1, steps + 1) if steps % s == 0 and s * h <= PROCESSORS), default=1)
  cache = [c.codes.reshape(h * t, d) for c in (keys, values)]
  out, most, total = _call(q, cache, [*_rows(keys, values), mask], splits, heads, interpret)
  weight = jnp.exp2(most - jnp.max(most, axis=1, keepdims=True))         # [h, parts, heads]
  y = jnp.sum(out * weight[..., None], axis=1) / jnp.sum(total * weight, axis=1)[..., None]
  return qarray.cast(y[:, :g], query.dtype)


def _rows(keys, values):
  """The scales of keys and of values, and both offsets if either has some: f32[h, t] each."""
  rows = [keys.scale, values.scale]
  if keys.zero is not None or values.zero is not None:
    rows += [jnp.zeros_like(c.scale) if c.zero is None else c.offset for c in (keys, values)]
  return [row[:, 0] for row in rows]


def _call(q, cache, rows, splits, heads, interpret):
  """Sums, maxima and totals of each part of the tokens: f32[h, parts, heads, d] and twice f32[h, parts, heads]."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  (h, _, d), t = q.shape, rows[0].shape[1]
  kernel = functools.partial(_kernel, splits, t // (WARPGROUPS * TOKENS * splits), bool(interpret))
  transforms = lambda columns: pipeline_gpu.swizzled((ROWS, columns), 16, None).transforms
  operand = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms(shape[-1]))
  shape = lambda *shape: jax.ShapeDtypeStruct((h, splits * WARPGROUPS, heads, *shape), jnp.float32)
  query_sums = jnp.sum(q.astype(jnp.float32), axis=-1)                   # [h, ROWS]
  return plgpu.kernel(
      kernel, out_type=(shape(d), shape(), shape()), grid=(h, splits), grid_names=('head', 'split'),
      num_threads=WARPGROUPS + 1, thread_name='warpgroup', interpret=interpret,
      scratch_types=(operand(ROWS, d), (operand(WARPGROUPS, TOKENS, d), operand(WARPGROUPS, ROWS, TOKENS)),
                     plgpu.SMEM((WARPGROUPS, ROWS, d), jnp.float32), plgpu.SMEM((2, WARPGROUPS, ROWS), jnp.float32),
                     plgpu.Barrier()),
      compiler_params=pipeline_gpu.compiler_params())(q, query_sums, *cache, *rows)


def _kernel(splits, steps, interpreted, query, query_sums, *refs):
  """One head's tokens, or a split of them."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu
  *cache, out, most, total, q, buffers, sums, vectors, loaded = refs
  head, split, warpgroup = (jax.lax.axis_index(a) for a in ('head', 'split', 'warpgroup'))
  own, run, d = pl.ds(warpgroup * TOKENS, TOKENS), WARPGROUPS * TOKENS, q.shape[1]
  pl.when(warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(query.at[head], q, loaded))
  plgpu.barrier_wait(loaded)

  def compute(pipeline):
    column = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), plgpu.Layout.WGMMA)
    found = pipeline((zeros, column(MASKED), column(0.0)))
    places = sums.at[warpgroup], vectors.at[0, warpgroup], vectors.at[1, warpgroup]
    for place, value in zip(places, found):
      place[...] = value
    plgpu.commit_smem()
    for place, to in zip(places, (out, most, total)):
      plgpu.copy_smem_to_gmem(place.at[pl.ds(0, to.shape[2])], to.at[head, split * WARPGROUPS + warpgroup])
    plgpu.wait_smem_to_gmem(0)

  def step(_, keys, values, *rows_and_carry):
    *rows, carry = rows_and_carry
    key_scale, value_scale, *offsets, mask = (row.at[0, own] for row in rows)
    run_of_64 = Step(keys.at[own], values.at[own], key_scale, value_scale, *(offsets or (None, None)), mask)
    carry = _step((q, query_sums.at[head]), run_of_64, [b.at[warpgroup] for b in buffers], carry)
    if interpreted:
      pipeline_gpu.interpreted_reads_are_done()
    return carry

  tile = lambda codes: pipeline_gpu.swizzled((run, d), prepared.bits(codes.dtype),
                                             lambda k: ((head * splits + split) * steps + k, 0))
  row = lambda i: plgpu.BlockSpec((1, run), lambda k: (i, split * steps + k))
  plgpu.emit_pipeline_warp_specialized(
      step, grid=(steps,), memory_registers=40, wg_axis='warpgroup', num_compute_wgs=WARPGROUPS,
      max_concurrent_steps=min(STAGES, steps), compute_context=compute,
      in_specs=[tile(cache[0]), tile(cache[1]), *[row(head)] * (len(cache) - 3), row(0)])(*cache)


class Step(NamedTuple):
  """References to the 64 tokens of a step: codes [tokens, d], and f32[tokens]."""
  keys: Any
  values: Any
  key_scale: Any
  value_scale: Any
  key_offset: Any
  value_offset: Any
  mask: Any


def _step(query, tokens, buffers, carry):
  """64 tokens: Alg. 1, lines 9 to 13, in base 2. The output is divided by the totals at the end."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu
  (q, query_sums), (numbers, probabilities) = query, buffers
  y, m, l = carry

  def product(a, b):
    def multiply(sums):
      plgpu.wgmma(sums, a, b)
      plgpu.wgmma_wait(0)
      return sums[...]
    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

  def unpack(codes):
    layout = plgpu.Layout.WGMMA_UPCAST_4X if codes.dtype == jnp.int4 else plgpu.Layout.WGMMA_8BIT
    loaded = plgpu.load(codes, layout=layout)
    numbers[...] = loaded.astype(jnp.bfloat16)

  unpack(tokens.keys)
  plgpu.commit_smem()
  scores = product(q, numbers.T)                                         # [rows, tokens]
  vector = lambda ref: pipeline_gpu.vector(ref, scores.shape, 1)
  spread = lambda v, like: jax.lax.broadcast_in_dim(v, like.shape, [0])
  scores = scores * vector(tokens.key_scale)
  if tokens.key_offset is not None:
    scores = scores + pipeline_gpu.vector(query_sums, scores.shape, 0) * vector(tokens.key_offset)
  scores = scores + vector(tokens.mask)
  before, m = m, jnp.maximum(m, jnp.max(scores, axis=1))
  p, shrink = jnp.exp2(scores - spread(m, scores)), jnp.exp2(before - m)
  l = l * shrink + jnp.sum(p, axis=1)
  probabilities[...] = (p * vector(tokens.value_scale)).astype(jnp.bfloat16)
  unpack(tokens.values)
  plgpu.commit_smem()
  y = y * spread(shrink, y) + product(probabilities, numbers)
  if tokens.value_offset is not None:
    y = y + spread(jnp.sum(p * vector(tokens.value_offset), axis=1), y)
  return y, m, l
