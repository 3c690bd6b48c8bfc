"""The frame of Hopper's products: tiles in a grid, two warpgroups that multiply, one that fetches ahead.

Products are computed transposed: a warpgroup has `columns` of the weight as the side of wgmma that takes 64 rows, and
the `rows` of x as its columns, which may be as few as 8. All splits of a sum are written, and XLA adds them up.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qat.kernels import tiles_gpu


def needs_jax():
  """Why this jax has no kernels for Hopper, or None. `plgpu.load` and the interpreter changed in 0.11."""
  if tuple(int(v) for v in jax.__version__.split('.')[:2]) < (0, 11):
    return f'this is jax {jax.__version__}, and the kernels need 0.11 or newer'
  return None


def needs_hopper(device):
  """Why a device cannot run these kernels, or None."""
  capability = getattr(device, 'compute_capability', None)
  if capability is None or not capability.startswith('9.'):
    return f'{device.device_kind} has compute capability {capability}, and the kernels are for 9.0'
  return None


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a warpgroup works: its tile's index along rows, columns and splits, and its own index."""
  row: Any
  column: Any
  split: Any
  warpgroup: Any
  tiles: tiles_gpu.Tiles
  steps: int

  @property
  def own(self):
    """Of the block's columns, those of this warpgroup."""
    return _slice(self.warpgroup, self.tiles.columns)

  @property
  def rows(self):
    return _slice(self.row, self.tiles.rows)

  @property
  def columns(self):
    return _slice(self.column * tiles_gpu.WARPGROUPS + self.warpgroup, self.tiles.columns)

  def step(self, k):
    """The index along all of K of this split's step k."""
    return self.split * self.steps + k


def _slice(index, size):
  from jax.experimental import pallas as pl
  return pl.ds(index * size, size)


@dataclasses.dataclass(frozen=True)
class Work:
  """What is done for each tile of a product.

  Attributes:
    step: (place, *references to a step's blocks, y) -> y, where y is the tile [columns, rows]: f32 in registers, or if
      there are `sums`, a reference to wgmma's accumulator.
    specs: (place) -> a plgpu.BlockSpec for each array that is fetched step by step.
    sums: the dtype of the accumulator that `step` adds to, if it does.
    finish: (place, y, *references to the other arrays) -> y, applied to the sum.
  """
  step: Callable
  specs: Callable
  sums: Any = None
  finish: Callable | None = None


def call(work, tiles, shape, streamed, whole=(), *, dtype, interpret=None):
  """Runs `work` down K for each tile.

  Args:
    work: a Work.
    tiles: a Tiles.
    shape: (m, n, k), multiples of the tiles.
    streamed: arrays fetched step by step.
    whole: arrays that only `work.finish` reads.
    dtype: of the result.
    interpret: plgpu.InterpretGPUParams, True, or a false value.

  Returns:
    dtype[splits, m, n].
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu
  m, n, k = shape
  kernel = functools.partial(_kernel, work, tiles, k // (tiles.depth * tiles.splits), len(streamed))
  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((tiles.splits, m, n), dtype), grid_names=('column', 'split', 'row'),
      grid=(n // tiles.width, tiles.splits, m // tiles.rows), thread_name='warpgroup',
      num_threads=tiles_gpu.WARPGROUPS + 1, interpret=params(interpret), compiler_params=compiler_params(),
      scratch_types=(plgpu.SMEM((tiles_gpu.WARPGROUPS, tiles.rows, tiles.columns), dtype),))(*streamed, *whole)


def _kernel(work, tiles, steps, streams, *refs):
  """One block: `steps` steps of two warpgroups, that a third fetches for."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu
  *inputs, out, scratch = refs
  place = Place(*(jax.lax.axis_index(a) for a in ('row', 'column', 'split', 'warpgroup')), tiles, steps)
  tile = (tiles.columns, tiles.rows)

  def store(y):
    if work.finish is not None:
      y = work.finish(place, y, *inputs[streams:])
    own = scratch.at[place.warpgroup]
    own.T[...] = plgpu.layout_cast(y.astype(scratch.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, out.at[place.split, place.rows, place.columns])
    plgpu.wait_smem_to_gmem(0)

  def compute(pipeline):
    if work.sums is None:
      store(pipeline(plgpu.layout_cast(jnp.zeros(tile, jnp.float32), plgpu.Layout.WGMMA)))
      return

    def accumulate(y):
      pipeline(y)
      store(y[...])
    pl.run_scoped(accumulate, plgpu.ACC(tile, work.sums))

  plgpu.emit_pipeline_warp_specialized(
      lambda _, *blocks: work.step(place, *blocks), grid=(steps,), memory_registers=40, wg_axis='warpgroup',
      num_compute_wgs=tiles_gpu.WARPGROUPS, max_concurrent_steps=tiles.stages, compute_context=compute,
      in_specs=work.specs(place))(*inputs[:streams])


def compiler_params():
  """Layouts of registers are inferred for whole warpgroups."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def params(interpret):
  """What plgpu.kernel takes: None for the device, or how to interpret."""
  if interpret is not True:
    return interpret or None
  from jax.experimental.pallas import mosaic_gpu as plgpu
  return plgpu.InterpretGPUParams()


def interpreted_reads_are_done():
  """Ends a step in interpret mode, which wants a fence between a thread's reads and TMA's next write to the same place.

  On the device the barrier that frees the place orders them: CUTLASS's pipelines have no fence there.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu
  plgpu.commit_smem()


def swizzled(shape, bits, index, run=None, **options):
  """The BlockSpec of an operand of wgmma: rows of `bits` wide numbers, in slices of `run` columns."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  swizzle = plgpu.find_swizzle((run or shape[1]) * bits, 'operand')
  transforms = plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)
  return plgpu.BlockSpec(shape, index, transforms=transforms, **options)


def vector(ref, shape, axis, dtype=jnp.float32):
  """A vector along `axis` of tiles of `shape`, from shared or global memory: dtype[*shape]."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  loaded = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)
  return jax.lax.broadcast_in_dim(loaded.astype(dtype), shape, [axis])
