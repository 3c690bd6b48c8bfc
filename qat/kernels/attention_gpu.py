"""Decoding attention over a cache in codes on NVIDIA's Hopper, with the online softmax of FlashAttention.

Dao et al. FlashAttention, NeurIPS 2022, Alg. 1. https://arxiv.org/abs/2205.14135. Tokens are split between blocks, as
in Flash-Decoding (Dao et al. 2023), and between the two warpgroups of one; XLA weighs what each found. Codes become
bf16 in shared memory, without their scales, which multiply scores and probabilities. The heads of a group are padded to
the 64 rows that wgmma takes at least.

All of the cache is read, and what lies beyond `length` is masked.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import qarray
from qat.kernels import attention, pipeline_gpu
from qat.kernels.tiles_gpu import PROCESSORS, WARPGROUPS

ROWS, TOKENS, STAGES = 64, 64, 2   # Heads of a group; tokens of a warpgroup's step.
MASKED = -1e30                     # As -inf, but exp2(MASKED - MASKED) is a number.


def unsupported(query, keys, values):
  """Why this kernel does not run, or None. Asks no device."""
  if why := pipeline_gpu.needs_jax() or attention.unsupported(query, keys, values):
    return why
  if keys.codes.dtype != jnp.int8 or values.codes.dtype != jnp.int8:
    return f'the cache is of {keys.codes.dtype} and {values.codes.dtype}; the kernel reads int8'
  if keys.shape[1] % (WARPGROUPS * TOKENS) or keys.shape[2] not in (64, 128):
    return f'keys of shape {keys.shape} are not of whole {WARPGROUPS * TOKENS} tokens by 64 or 128'
  if query.shape[1] > ROWS or query.dtype != jnp.bfloat16:
    return f'the query is {query.dtype}{query.shape}; the kernel takes bfloat16, and {ROWS} heads a group or fewer'
  return None


def decode(query: Float[Array, 'h g d'], keys, values, length, interpret=False) -> Float[Array, 'h g d']:
  """attention.decode(query, keys, values, length)."""
  if why := unsupported(query, keys, values):
    raise NotImplementedError(f'Attention over a cache in codes by the GPU kernel: {why}. Use attention.decode.')
  return _decode(query, keys, values, length, pipeline_gpu.params(interpret))


@functools.partial(jax.jit, static_argnums=4)
def _decode(query, keys, values, length, interpret):
  (h, g, d), t = query.shape, keys.shape[1]
  scores_in_base_2 = d**-0.5 * math.log2(math.e)
  q = jnp.pad((query.astype(jnp.float32) * scores_in_base_2).astype(jnp.bfloat16), ((0, 0), (0, ROWS - g), (0, 0)))
  flat = lambda codes: codes.reshape(h * t, d)
  row = lambda q: qarray.decode(q.scale)[..., 0]                         # [h, t]
  mask = jnp.where(jnp.arange(t)[None] < length, 0.0, MASKED).astype(jnp.float32)
  steps, heads = t // (WARPGROUPS * TOKENS), -(-g // 8) * 8              # What is written of the 64 rows.
  splits = max((s for s in range(1, steps + 1) if steps % s == 0 and s * h <= PROCESSORS), default=1)
  cache = flat(keys.codes), row(keys), flat(values.codes), row(values), mask
  out, most, total = _call(q, cache, splits, heads, interpret)
  weight = jnp.exp2(most - jnp.max(most, axis=1, keepdims=True))         # [h, parts, heads]
  y = jnp.sum(out * weight[..., None], axis=1) / jnp.sum(total * weight, axis=1)[..., None]
  return qarray.cast(y[:, :g], query.dtype)


def _call(q, cache, splits, heads, interpret):
  """Sums, maxima and totals of each part of the tokens: f32[h, parts, heads, d] and twice f32[h, parts, heads]."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  (h, _, d), t = q.shape, cache[1].shape[1]
  kernel = functools.partial(_kernel, splits, t // (WARPGROUPS * TOKENS * splits), bool(interpret))
  transforms = lambda columns: pipeline_gpu.swizzled((ROWS, columns), 16, None).transforms
  operand = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms(shape[-1]))
  shape = lambda *shape: jax.ShapeDtypeStruct((h, splits * WARPGROUPS, heads, *shape), jnp.float32)
  return plgpu.kernel(
      kernel, out_type=(shape(d), shape(), shape()), grid=(h, splits), grid_names=('head', 'split'),
      num_threads=WARPGROUPS + 1, thread_name='warpgroup', interpret=interpret,
      scratch_types=(operand(ROWS, d), (operand(WARPGROUPS, TOKENS, d), operand(WARPGROUPS, ROWS, TOKENS)),
                     plgpu.SMEM((WARPGROUPS, ROWS, d), jnp.float32), plgpu.SMEM((2, WARPGROUPS, ROWS), jnp.float32),
                     plgpu.Barrier()),
      compiler_params=pipeline_gpu.compiler_params())(q, *cache)


def _kernel(splits, steps, interpreted, query, *refs):
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

  def step(_, keys, key_scale, values, value_scale, mask, carry):
    blocks = keys.at[own], key_scale.at[0, own], values.at[own], value_scale.at[0, own], mask.at[0, own]
    carry = _step(q, blocks, [b.at[warpgroup] for b in buffers], carry)
    if interpreted:
      pipeline_gpu.interpreted_reads_are_done()
    return carry

  codes = pipeline_gpu.swizzled((run, d), 8, lambda k: ((head * splits + split) * steps + k, 0))
  row = lambda i: plgpu.BlockSpec((1, run), lambda k: (i, split * steps + k))
  plgpu.emit_pipeline_warp_specialized(
      step, grid=(steps,), memory_registers=40, wg_axis='warpgroup', num_compute_wgs=WARPGROUPS,
      max_concurrent_steps=min(STAGES, steps), compute_context=compute,
      in_specs=[codes, row(head), codes, row(head), row(0)])(*cache)


def _step(q, blocks, buffers, carry):
  """64 tokens: Alg. 1, lines 9 to 13, in base 2. The output is divided by the totals at the end."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu
  (keys, key_scale, values, value_scale, mask), (numbers, probabilities) = blocks, buffers
  y, m, l = carry

  def product(a, b):
    def multiply(sums):
      plgpu.wgmma(sums, a, b)
      plgpu.wgmma_wait(0)
      return sums[...]
    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

  def unpack(codes):
    loaded = plgpu.load(codes, layout=plgpu.Layout.WGMMA_8BIT)
    numbers[...] = loaded.astype(jnp.bfloat16)

  unpack(keys)
  plgpu.commit_smem()
  scores = product(q, numbers.T)                                         # [rows, tokens]
  vector = lambda ref: pipeline_gpu.vector(ref, scores.shape, 1)
  scores = scores * vector(key_scale) + vector(mask)
  before, m = m, jnp.maximum(m, jnp.max(scores, axis=1))
  spread = lambda v, like: jax.lax.broadcast_in_dim(v, like.shape, [0])
  p, shrink = jnp.exp2(scores - spread(m, scores)), jnp.exp2(before - m)
  l = l * shrink + jnp.sum(p, axis=1)
  probabilities[...] = (p * vector(value_scale)).astype(jnp.bfloat16)
  unpack(values)
  plgpu.commit_smem()
  return y * spread(shrink, y) + product(probabilities, numbers), m, l
