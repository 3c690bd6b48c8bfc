"""The Hadamard rotation of core/hadamard.py on NVIDIA's Hopper: one pass over memory, by matrix products.

For n = 64 b, b = 64 or 128, H_n = H_64 (x) H_b, so that a row, seen as X[64, b], becomes H_64 X H_b: two wgmma.
Entries of 1 and -1 are exact in bf16; X H_b is split into two bf16, of which the second holds what the first lost, so
that sums are good to 16 bits. HadaCore puts rotations on tensor cores too: Agarwal et al. 2024.
https://arxiv.org/abs/2412.08832
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import hadamard
from qat.kernels import pipeline_gpu
from qat.kernels.tiles_gpu import PROCESSORS, WARPGROUPS

LEFT, RIGHTS, STAGES = 64, (64, 128), 3


def unsupported(x):
  """Why the last axis of x is not rotated here, or None. Asks no device."""
  if why := pipeline_gpu.needs_jax():
    return why
  n = x.shape[-1]
  if n not in [LEFT * b for b in RIGHTS]:
    return f'{n} channels are not {LEFT} times one of {RIGHTS}'
  if x.dtype != jnp.bfloat16:
    return f'the input is {x.dtype}; the kernel rotates bfloat16'
  return 'the input is empty' if 0 in x.shape else None


def transform(x: Float[Array, '*rows n'], interpret=False) -> Float[Array, '*rows n']:
  """x H / sqrt(n) along the last axis, in the dtype of x."""
  if why := unsupported(x):
    raise NotImplementedError(f'A rotation of {x.shape} by the GPU kernel: {why}. Use core.hadamard.transform.')
  return _transform(x.reshape(-1, LEFT, x.shape[-1] // LEFT), pipeline_gpu.params(interpret)).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=1)
def _transform(x, interpret):
  """[m, 64, b] -> [m, 64, b]: each warpgroup takes a row a step."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu
  m, _, b = x.shape
  blocks = min(PROCESSORS, -(-m // WARPGROUPS))
  steps = -(-m // (WARPGROUPS * blocks))
  spec = pipeline_gpu.swizzled((WARPGROUPS, LEFT, b), 16, lambda k: (jax.lax.axis_index('block') * steps + k, 0, 0), b)
  square = lambda n: plgpu.SMEM((n, n), jnp.bfloat16, transforms=_transforms(n))
  parts = plgpu.SMEM((2, WARPGROUPS, LEFT, b), jnp.bfloat16, transforms=spec.transforms)

  def kernel(x, left_matrix, right_matrix, out, left, right, parts, loaded):
    warpgroup = jax.lax.axis_index('warpgroup')

    @pl.when(warpgroup == 0)
    def _():
      plgpu.copy_gmem_to_smem(left_matrix, left, loaded)
      plgpu.copy_gmem_to_smem(right_matrix, right, loaded)
    plgpu.barrier_wait(loaded)

    def step(indices, x):
      row = (jax.lax.axis_index('block') * steps + indices[0]) * WARPGROUPS + warpgroup
      own = parts.at[0, warpgroup], parts.at[1, warpgroup]
      _rotate(x.at[warpgroup], left, right, *own, 1 / math.sqrt(LEFT * b))

      @pl.when(row < m)
      def _():
        plgpu.copy_smem_to_gmem(own[0], out.at[row])

    plgpu.emit_pipeline_warp_specialized(
        step, grid=(steps,), memory_registers=40, wg_axis='warpgroup', num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=min(STAGES, steps), in_specs=[spec])(x)
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(blocks,), grid_names=('block',),
      num_threads=WARPGROUPS + 1, thread_name='warpgroup', interpret=interpret,
      scratch_types=(square(LEFT), square(b), parts, plgpu.Barrier(num_arrivals=2)),
      compiler_params=pipeline_gpu.compiler_params())(x, *(jnp.asarray(hadamard.matrix(n), x.dtype) for n in (LEFT, b)))


def _rotate(x, left, right, high, low, scale):
  """H_64 x H_b times `scale`, from x[64, b] to `high`."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def product(*pairs):
    def multiply(sums):
      for a, b in pairs:
        plgpu.wgmma(sums, a, b)
      plgpu.wgmma_wait(0)
      return sums[...]
    return pl.run_scoped(multiply, plgpu.ACC(x.shape, jnp.float32))

  y = product((x, right))
  rounded = y.astype(jnp.bfloat16)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)                        # The last row has left `high`.
  high[...] = rounded
  low[...] = (y - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
  plgpu.commit_smem()
  y = product((left, high), (left, low))
  high[...] = (y * scale).astype(jnp.bfloat16)
  plgpu.commit_smem()


def _transforms(columns):
  return pipeline_gpu.swizzled((columns, columns), 16, lambda: (0, 0)).transforms
