"""Products of two arrays in codes on NVIDIA's Hopper: int8 by int8, and fp8 by fp8.

    y[m, n] = x_scale[m] (w_scale[n] (codes of x @ codes of w)[m, n] + w_offset[n] sum(codes of x[m]))

Both operands come from shared memory with K minor, as wgmma demands of bytes. Integers are summed in int32 all along K:
exactly. wgmma sums fp8 with some 14 bits, so each step of 128 is added to sums in f32, as DeepSeek-V3 does (2024,
Sec. 3.3.2). https://arxiv.org/abs/2412.19437

Weights of fewer bits are widened to int8 when they are prepared: they cost bandwidth as int8 does.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, qarray
from qat.kernels import groups as groups_, pipeline_gpu, tiles_gpu
from qat.kernels.prepared import Prepared
from qat.kernels.tiles_gpu import DEPTH, Tiles

LAYOUT = 'gpu-sm90-codes/1'


def unsupported(x, w) -> str | None:
  """Why x @ w does not run here, or None. Asks no device.

  Args:
    x: QArray[m, k].
    w: QArray[k, n] or Prepared; arrays may be shapes only.
  """
  if why := pipeline_gpu.needs_jax():
    return why
  if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[0] or 0 in (*x.shape, *w.shape):
    return f'there are {tuple(x.shape)} and {tuple(w.shape)}, and no [m, k] and [k, n]'
  if not isinstance(x, qarray.QArray):
    return 'the input is no QArray: both sides have codes here'
  whole = _is_whole(x.spec.format) and x.codes.dtype != jnp.uint8
  if not whole and not _is_fp8(x.spec.format):
    return f'the input is on {x.spec.format}; wgmma multiplies signed integers and fp8'
  if x.zero is not None or not isinstance(x.spec.block, tuple) or blocks.scale_shape(x.spec.block, x.shape)[-1] != 1:
    return f'the input is on {x.spec}; it has one scale a row, or fewer, and no zeros'
  if not (_is_whole if whole else _is_fp8)(w.spec.format):
    return f'{x.spec.format} does not multiply {w.spec.format}'
  group = groups_.group_size(w.spec, w.shape)
  if isinstance(group, str):
    return group
  if group != w.shape[0]:
    return f'the weight has groups of {group} inputs, and not one scale an output, or fewer'
  return None


def _is_whole(format):
  return isinstance(format, formats.Int | formats.Binary)


def _is_fp8(format):
  return format in (formats.FP8_E4M3, formats.FP8_E5M2)


@jax.jit
def prepare(q: qarray.QArray) -> Prepared:
  """A weight as the kernel reads it: K minor, padded by zeros to multiples of 128 on both sides.

  Args:
    q: QArray[k, n].

  Returns:
    Prepared with codes, int8 or fp8 [n, k]; scale, f32[n]; and where the grid has zeros, minimums or unsigned bytes,
    offset, f32[n].
  """
  (k, n), w = q.shape, groups_.of(q)
  codes, scale, offset = w.codes, w.scale[0], w.offset
  if w.offset is not None:
    offset = w.offset[0]
  if _is_whole(w.format):
    if w.format.max > 127:
      codes, offset = codes.astype(jnp.int32) - 128, 128 * scale + (0 if offset is None else offset)
    codes = codes.astype(jnp.int8)
  rows, columns = -n % DEPTH, -k % DEPTH
  arrays = {'codes': jnp.pad(codes.T, ((0, rows), (0, columns))), 'scale': jnp.pad(scale, (0, rows))}
  if offset is not None:
    arrays['offset'] = jnp.pad(offset, (0, rows))
  return Prepared(arrays, q.spec, (k, n), LAYOUT)


def decode(p: Prepared, dtype=jnp.float32) -> Float[Array, 'k n']:
  """The numbers of a prepared weight."""
  k, n = p.shape
  numbers = p.arrays['codes'].astype(jnp.float32) * p.arrays['scale'][:, None]
  if 'offset' in p.arrays:
    numbers = numbers + p.arrays['offset'][:, None]
  return numbers[:n, :k].T.astype(dtype)


def heuristic(m, p):
  """Tiles for m rows: 128 of them or fewer, and enough splits to fill the processors."""
  n, k = p.arrays['codes'].shape
  rows = min(-(-m // 8) * 8, 128)
  return tiles_gpu.split(m, n, k, Tiles(rows, stages=6), functools.partial(shared_bytes, p))


def shared_bytes(p, tiles):
  """Of the stages and of the result in f32."""
  return tiles.stages * (tiles.rows + tiles.width) * tiles.depth + 4 * tiles.width * tiles.rows + 1024


def matmul(x: qarray.QArray, p: Prepared, tiles: Tiles | None = None, interpret=False,
           dtype=jnp.float32) -> Float[Array, 'm n']:
  """x @ p.

  Args:
    x: QArray[m, k].
    p: a QArray[k, n] that `prepare` rearranged.
    tiles: by `heuristic` if not given.
    interpret: runs the kernel on the CPU if True, or plgpu.InterpretGPUParams to say how.
    dtype: of the result.

  Returns:
    dtype[m, n].
  """
  if p.layout != LAYOUT:
    raise ValueError(f'The weight is in layout {p.layout!r}; this kernel reads {LAYOUT!r}. Prepare its QArray again.')
  if why := unsupported(x, p):
    raise NotImplementedError(f'Hopper does not multiply {x.spec} by {p.spec} here: {why}. Use the form in XLA.')
  tiles = tiles or heuristic(x.shape[0], p)
  n, k = p.arrays['codes'].shape
  if why := tiles_gpu.untiled(n, k, tiles) or tiles_gpu.too_large(tiles, shared_bytes(p, tiles)):
    raise ValueError(f'{why}. Give other tiles, or none.')
  return _matmul(x, p, tiles, pipeline_gpu.params(interpret), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret', 'dtype'))
def _matmul(x, p, tiles, interpret, dtype):
  """The kernel, and what XLA does around it: padding, sums of x, the sum over splits."""
  (m, k), n, w = x.shape, p.shape[1], p.arrays['codes']
  whole, rows = _is_whole(x.spec.format), -m % tiles.rows
  codes = x.codes.astype(jnp.int8) if whole else x.codes
  codes = jnp.pad(codes, ((0, rows), (0, w.shape[1] - k)))
  vectors = [jnp.pad(jnp.broadcast_to(qarray.decode(x.scale), (m, 1))[:, 0], (0, rows)), p.arrays['scale']]
  if 'offset' in p.arrays:
    vectors += [p.arrays['offset'], jnp.sum(codes.astype(jnp.float32), axis=1)]
  step = _interpreted if interpret else _integers if whole else _floats
  late = int(step is _integers and tiles.stages > 1)
  work = pipeline_gpu.Work(step, functools.partial(_specs, late), finish=_scaled,
                           sums=jnp.int32 if whole and not interpret else None)
  y = pipeline_gpu.call(work, tiles, (codes.shape[0], *w.shape), [codes, w], vectors, interpret=interpret,
                        dtype=dtype if tiles.splits == 1 else jnp.float32)
  y = y[0] if tiles.splits == 1 else jnp.sum(y, axis=0)
  return y[:m, :n].astype(dtype)


def _specs(late, place):
  """What a step reads of x and w, and how many steps later that may be overwritten."""
  tiles = place.tiles
  block = lambda size, index: pipeline_gpu.swizzled(
      (size, tiles.depth), 8, lambda k: (index, place.step(k)), delay_release=late)
  return [block(tiles.rows, place.row), block(tiles.width, place.column)]


def _integers(place, x, w, y):
  """One step: wgmma adds to the sums in int32, and is waited for in the next."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  plgpu.wgmma(y, w.at[place.own], x.T)
  plgpu.wgmma_wait(1 if place.tiles.stages > 1 else 0)
  return y


def _floats(place, x, w, y):
  """One step: its product is added to the sums in f32."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def multiply(product):
    plgpu.wgmma(product, w.at[place.own], x.T)
    plgpu.wgmma_wait(0)
    return product[...]
  return y + pl.run_scoped(multiply, plgpu.ACC(y.shape, jnp.float32))


def _interpreted(place, x, w, y):
  """The same step in jnp."""
  wide = lambda a: a.astype(jnp.float32)
  y = y + jnp.dot(wide(w[place.own]), wide(x[...]).T, precision=jax.lax.Precision.HIGHEST)
  pipeline_gpu.interpreted_reads_are_done()
  return y


def _scaled(place, y, x_scale, w_scale, *rest):
  """The sums of a tile [columns, rows], scaled."""
  y = y.astype(jnp.float32)
  vector = lambda ref, indices, axis: pipeline_gpu.vector(ref.at[indices], y.shape, axis)
  y = y * vector(w_scale, place.columns, 0)
  if rest:
    offset, sums = rest
    first = (place.split == 0).astype(jnp.float32)                        # One of the splits adds the offset.
    y = y + vector(offset, place.columns, 0) * (first * vector(sums, place.rows, 1))
  return y * vector(x_scale, place.rows, 1)
