"""Products with a weight in codes on TPU, in Pallas Mosaic.

A grid step reads a tile of codes and of scales, and adds to an accumulator in VMEM. With few rows the scales multiply
each group's product, one multiplication a group and output; with many they go into the weight, one a weight, which
leaves one product of all groups. XLA adds what offsets (zero points, minimums) contribute: the sums of the groups of x
times the offsets, a product G / k the size.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from qat.core import blocks, formats, qarray
from qat.kernels import groups as groups_, prepared

LAYOUT = 'tpu/1'
LANES, SUBLANES = 128, 8
VMEM_BYTES = 48 * 2**20  # Of the 64 MiB of the smallest chip (tpu7x), what a kernel may ask for.
FEW_ROWS = 64            # Up to here a scale after each group's product takes fewer bundles than one in the weight.


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Of the product [rows, inputs] x [inputs, outputs] of a grid step."""
  rows: int
  outputs: int
  inputs: int


def unsupported(x, w, tiles=None):
  """Why x @ w does not run here, or None. Asks no device.

  Args:
    x: float[m, k] or QArray[m, k].
    w: QArray[k, n] or Prepared; arrays may be shapes only.
    tiles: chosen by `heuristic` if not given.
  """
  m, k = x.shape
  if why := _unsupported_grid(w.spec, w.shape) or _unsupported_input(x, w):
    return why
  size = groups_.group_size(w.spec, w.shape)
  if isinstance(w.spec.format, formats.Codebook) and size % SUBLANES:
    return f'groups of {size} inputs are no multiple of {SUBLANES}, which are looked up at a time'
  tiles = tiles or heuristic(m, k, w.shape[-1], size)
  if tiles is None or k % tiles.inputs:
    return f'no tile of inputs, of whole groups of {size} by {SUBLANES} and of {LANES}, divides {k}'
  return None


def matmul(x, p, tiles=None, interpret=False):
  """x @ w.

  Args:
    x: bf16[m, k] or QArray[m, k].
    p: Prepared[k, n].
    tiles: chosen by `heuristic` if not given.
    interpret: True, or a pltpu.InterpretParams, runs the kernel without a TPU.

  Returns:
    [m, n], in the dtype of x, or f32 for a QArray.
  """
  (m, k), n = x.shape, p.shape[-1]
  scale = p.arrays['scale']
  size = k // scale.shape[0]
  tiles = tiles or heuristic(m, k, n, size)
  codes = x.codes if isinstance(x, qarray.QArray) else x
  operand = codes.astype(jnp.int8) if codes.dtype == jnp.int4 else codes
  out = jnp.float32 if isinstance(x, qarray.QArray) or 'offset' in p.arrays else x.dtype
  y = _call(operand, p.arrays['codes'], scale, p.spec.format, out, tiles, interpret)
  if 'offset' in p.arrays:
    y = y + jnp.dot(groups_.sums(codes, size), p.arrays['offset'], precision=jax.lax.Precision.HIGHEST)
  if isinstance(x, qarray.QArray):
    return y * qarray.decode(x.scale).reshape(-1, 1)
  return qarray.cast(y, x.dtype)


def _unsupported_grid(spec, shape):
  """Why a weight cannot be prepared, or None."""
  size = groups_.group_size(spec, shape)
  if isinstance(size, str):
    return size
  if isinstance(spec.format, formats.Float) and spec.format.dtype is None:
    return f'{spec.format} has no type on TPU'
  if isinstance(spec.format, formats.Codebook) and spec.format.bits > 4:
    return f'{spec.format} has {len(spec.format.values)} levels; tables of 16 are looked up'
  if isinstance(spec.format, formats.Float) and spec.format.bits > 8:
    return f'{spec.format} is no low-bit format'
  return None


def _unsupported_input(x, w):
  """Why an input cannot be multiplied, or None."""
  if not isinstance(x, qarray.QArray):
    return None if x.dtype == jnp.bfloat16 else f'the input is {x.dtype}; the MXU multiplies bfloat16'
  whole = isinstance(x.spec.format, formats.Int) and x.spec.format.signed
  if x.zero is not None or x.spec.block is None or not (whole or x.spec.format in (formats.FP8_E4M3, formats.FP8_E5M2)):
    return f'the input is on {x.spec}; the MXU multiplies signed integers and fp8 without zero points'
  if isinstance(x.spec.block, blocks.Flat) or blocks.scale_shape(x.spec.block, x.shape)[-1] != 1:
    return f'the input has scales in blocks {x.spec.block}, and not one a row'
  if whole != isinstance(w.spec.format, formats.Int):
    return f'{x.spec.format} does not multiply {w.spec.format}'
  return None


def prepare(q, fp4=None, fewest=2):
  """A QArray[k, n] for these kernels: codes of 2 bits in 2, of 3 and 4 in 4; scales and offsets f32[G, n].

  Args:
    q: the weight.
    fp4: whether the chip loads fp4, as tpu7x alone does; of this process' default device if not given. Others read
      twice its numbers as int8: twice the bytes, and no lookup.
    fewest: bits that a code takes. A QArray stores signed ones in 4, which a single call had better read as they are.
  """
  w = groups_.of(q)
  codes, scale, offset = w.codes, w.scale, w.offset
  if isinstance(w.format, formats.Codebook):
    codes = codes.astype(jnp.uint4)
  elif isinstance(w.format, formats.Int | formats.Binary):
    dtype, down = _integers(w.format, fewest)
    if down:
      codes, offset = codes.astype(jnp.int32) - down, down * scale + (0 if offset is None else offset)
    codes = codes.astype(dtype)
  elif w.format == formats.FP4_E2M1 and not (_loads_fp4() if fp4 is None else fp4):
    codes, scale = (2 * w.format.decode(codes)).astype(jnp.int8), scale / 2
  arrays = {'codes': codes, 'scale': scale} | ({} if offset is None else {'offset': offset})
  return prepared.Prepared(arrays, q.spec, q.shape, LAYOUT)


def _integers(format, fewest):
  """The type that integers are held in, and what is taken from them to be of it: loads of uint2 are slow."""
  least, most = int(format.min), int(format.max)
  down = 128 if most > 127 else 2 if (fewest, least, most) == (2, 0, 3) else 0
  fits = lambda info: info.bits >= fewest and info.min <= least - down and most - down <= info.max
  return next(dtype for dtype in (jnp.int2, jnp.int4, jnp.uint4, jnp.int8) if fits(jnp.iinfo(dtype))), down


def _loads_fp4():
  return jax.devices()[0].device_kind.lower().replace(' ', '').startswith('tpu7')


def heuristic(m, k, n, size):
  """Tiles for a product, or None if no tile of inputs divides k."""
  rows = min(-(-m // 16) * 16, 256)
  outputs = n if n <= LANES else min(1024, n // LANES * LANES)
  step = math.lcm(LANES, size * SUBLANES) if size < k else LANES
  fits = [t for t in range(step, min(k, 2048) + 1, step) if k % t == 0]
  if fits:
    return Tiles(rows, outputs, fits[-1])
  return Tiles(rows, outputs, k) if k * outputs <= 8 * 2**20 else None


def candidates(m, p):
  """Tiles that fit m rows by a Prepared weight, the heuristic's first."""
  k, n = p.shape
  size = k // p.arrays['scale'].shape[0]
  first = heuristic(m, k, n, size)
  step = math.lcm(LANES, size * SUBLANES) if size < k else LANES
  inputs = [t for t in range(step, min(k, 4096) + 1, step) if k % t == 0]
  found = [Tiles(first.rows, b, c) for b in (256, 512, 1024, 2048) if b <= n for c in inputs if 2**18 <= b * c <= 2**22]
  return [first, *(t for t in found if t != first)]


def _call(x, codes, scale, format, out, tiles, interpret):
  (m, k), n = x.shape, codes.shape[-1]
  size = k // scale.shape[0]
  a, b, c = tiles.rows, tiles.outputs, tiles.inputs
  scales = max(c // size, 1)
  exact = jnp.issubdtype(x.dtype, jnp.integer)
  body = functools.partial(_whole if size == k else _after if _scales_after(m, size, exact) else _before,
                           format=format, size=size)
  bits = prepared.bits(codes.dtype)
  return pl.pallas_call(
      body, jax.ShapeDtypeStruct((m, n), out), grid=(pl.cdiv(m, a), pl.cdiv(n, b), k // c),
      in_specs=[pl.BlockSpec((a, c), lambda i, j, l: (i, l)), pl.BlockSpec((c, b), lambda i, j, l: (l, j)),
                pl.BlockSpec((scales, b), lambda i, j, l: (l if size < k else 0, j))],
      out_specs=pl.BlockSpec((a, b), lambda i, j, l: (i, j)),
      scratch_shapes=[pltpu.VMEM((a, b), jnp.int32 if exact and size == k else jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'),
                                           vmem_limit_bytes=VMEM_BYTES),
      cost_estimate=pl.CostEstimate(flops=2 * m * k * n, transcendentals=0,
                                    bytes_accessed=k * n * bits // 8 + 4 * scale.size + x.nbytes + 4 * m * n),
      interpret=interpret, name=f'matmul_{format}'.lower())(x, codes, scale)


def _scales_after(m, size, exact):
  """Whether scales multiply each group's product. Groups narrower than the MXU would leave it mostly empty."""
  return exact or (m <= FEW_ROWS and size >= LANES)


def _values(codes, like, format):
  """Codes as numbers in the dtype of the input: [c, b] -> [c, b]."""
  if not isinstance(format, formats.Codebook):
    return codes.astype(like)
  return _look_up(codes.astype(jnp.int32), _tables(format, codes.shape[1])).astype(like)


def _tables(format, b):
  """The numbers of a codebook down the rows of a table, or two, all columns the same: [f32[8, b], ...]."""
  row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, b), 0)

  def table(numbers):
    found = jnp.zeros((SUBLANES, b), jnp.float32)
    for i, number in enumerate(numbers):
      found = jnp.where(row == i, jnp.float32(number), found)
    return found
  return [table(format.values[i:i + SUBLANES]) for i in range(0, len(format.values), SUBLANES)]


def _look_up(index, tables):
  """What i32[c, b] names in its own column of one table, or of two: a gather among sublanes, 8 rows at a time."""
  rows = []
  for i in range(0, index.shape[0], SUBLANES):
    at = index[i:i + SUBLANES]
    found = [_take(table, at & SUBLANES - 1) for table in tables]
    rows.append(found[0] if len(found) == 1 else jnp.where(at < SUBLANES, *found))
  return jnp.concatenate(rows)


def _take(table, at):
  """table[at[i, j], j] for each i and j: jnp.take_along_axis without what it adds for indices below 0."""
  dims = jax.lax.GatherDimensionNumbers((), collapsed_slice_dims=(0,), start_index_map=(0,), operand_batching_dims=(1,),
                                        start_indices_batching_dims=(1,))
  return jax.lax.gather(table, at[..., None], dims, (1, 1), mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _dot(x, w):
  kind = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
  return jnp.dot(x, w, preferred_element_type=kind)


def _accumulate(acc, add, finish):
  """The first step of inputs clears the accumulator, the last writes `finish(acc)`."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  acc[...] = add(acc[...])

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    finish(acc[...])


def _whole(x, codes, scale, y, acc, *, format, size):
  """One scale an output: after the sum."""
  del size
  finish = lambda total: y.__setitem__(..., (total.astype(jnp.float32) * scale[...]).astype(y.dtype))
  _accumulate(acc, lambda total: total + _dot(x[...], _values(codes[...], x.dtype, format)), finish)


def _after(x, codes, scale, y, acc, *, format, size):
  """Scales after the product of each group."""
  def add(total):
    for g in range(scale.shape[0]):
      rows = pl.ds(g * size, size)
      part = _dot(x[:, rows], _values(codes[rows, :], x.dtype, format))
      total += part.astype(jnp.float32) * scale[pl.ds(g, 1), :]
    return total

  _accumulate(acc, add, lambda total: y.__setitem__(..., total.astype(y.dtype)))


def _before(x, codes, scale, y, acc, *, format, size):
  """Scales into the weight, which is rounded to the dtype of x, and one product of all groups."""
  def add(total):
    c, b = codes.shape
    if isinstance(format, formats.Codebook):                             # A table takes the scale of each column.
      index, tables = codes[...].astype(jnp.int32), _tables(format, b)
      w = [_look_up(index[g * size:(g + 1) * size], [t * scale[pl.ds(g, 1), :] for t in tables])
           for g in range(c // size)]
      w = jnp.concatenate(w)
    else:
      w = (codes[...].astype(jnp.float32).reshape(c // size, size, b) * scale[...][:, None]).reshape(c, b)
    return total + _dot(x[...], w.astype(x.dtype))

  _accumulate(acc, add, lambda total: y.__setitem__(..., total.astype(y.dtype)))


def decode(p, dtype):
  """The numbers of a Prepared: dtype[k, n]."""
  codes, scale = p.arrays['codes'], p.arrays['scale']
  size = p.shape[0] // scale.shape[0]
  table = isinstance(p.spec.format, formats.Codebook)
  value = p.spec.format.decode(codes.astype(jnp.uint8)) if table else codes.astype(jnp.float32)
  w = qarray.exact(value.reshape(-1, size, p.shape[1]) * scale[:, None])
  if 'offset' in p.arrays:
    w = w + p.arrays['offset'][:, None]
  return qarray.cast(w.reshape(p.shape), dtype)
