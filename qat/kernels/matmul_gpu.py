"""Products by a low-bit weight on NVIDIA's Hopper: 16-bit inputs, codes that become numbers in registers.

    y[m, n] = sum over groups g of scale[g, n] (x[m, g] codes[g, n]) + offset[g, n] (sum of x[m, g])

The sides are swapped: the weight's columns n are wgmma's 64 rows, and come from registers, where their codes are
unpacked (unpack_gpu.py); the rows m of x are wgmma's columns, of which 8 are the least. A product of few rows wastes
nothing, and is bound by the bytes of the weight. One warpgroup fetches by TMA, `stages` ahead; two multiply.

Up to 64 rows scales multiply the sums of groups, in f32: they are exact, and an offset (a zero, a minimum, the bias of
the unpacking) costs a multiplication by the group's sum of x. Beyond, they multiply weights, rounded to bf16. Beyond
256 rows the weight is decoded once and XLA multiplies. K is split where there are fewer tiles than processors.

Machete (vLLM) and tokamax's ragged_dot swap sides too.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray
from qat.kernels import groups as groups_, pipeline_gpu, tiles_gpu, unpack_gpu
from qat.kernels.prepared import Prepared
from qat.kernels.tiles_gpu import DEPTH, Tiles

LAYOUT = 'gpu-sm90/1'
KERNEL_ROWS = 256                  # Beyond, decoding once costs little beside the product.


def unsupported(x, w) -> str | None:
  """Why x @ w does not run here, or None. Asks no device.

  Args:
    x: float[m, k].
    w: QArray[k, n] or Prepared; arrays may be shapes only.
  """
  if why := pipeline_gpu.needs_jax():
    return why
  if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[0] or x.shape[0] == 0:
    return f'there are {tuple(x.shape)} and {tuple(w.shape)}, and no [m, k] and [k, n]'
  if x.dtype != jnp.bfloat16:
    return f'the input is {x.dtype}; the kernel multiplies bfloat16'
  return _unsupported_weight(w)


def _unsupported_weight(w):
  """Why a QArray cannot be prepared, or None."""
  if unpack_gpu.unpacking(w.spec.format) is None:
    return f'{w.spec.format} is not unpacked: integers, tables of 16 levels and fp8 are'
  if len(w.shape) != 2 or 0 in w.shape:
    return f'the weight of shape {tuple(w.shape)} is no [k, n]'
  group = groups_.group_size(w.spec, w.shape)
  if isinstance(group, str):
    return group
  if group != w.shape[0] and (group < 16 or DEPTH % group and group % DEPTH):
    return f'groups of {group} inputs do not tile steps of {DEPTH}: those of 16, 32, 64 and multiples of 128 do'
  return None


@jax.jit
def prepare(q: qarray.QArray) -> Prepared:
  """A weight as the kernel reads it: K minor and shuffled, padded by zeros to multiples of 128 on both sides.

  Args:
    q: QArray[k, n].

  Returns:
    Prepared with codes, int4 or int8 [n, k]; scale, [k / group, n], bf16 if that holds every scale of the grid and f32
    else; and where the grid has zeros, minimums or unsigned bytes, offset, f32[k / group, n].
  """
  if why := _unsupported_weight(q):
    raise NotImplementedError(f'{q.spec} of shape {q.shape} is not prepared for Hopper: {why}. Keep the QArray.')
  (k, n), w, way = q.shape, groups_.of(q), unpack_gpu.unpacking(q.spec.format)
  scale, offset = w.scale, w.offset
  if isinstance(way, unpack_gpu.Integers8) and not way.signed:
    offset = 128 * scale + (0 if offset is None else offset)             # pack() takes 128 from the codes.
  columns, depth = -n % DEPTH, -k % DEPTH
  groups = 0 if w.size == k else depth // w.size                         # A group of all inputs stays one.
  pad = lambda a: jnp.pad(a, ((0, groups), (0, columns)))
  codes = jnp.pad(way.pack(w.codes).T, ((0, columns), (0, depth)))       # [n, k]
  arrays = {'codes': unpack_gpu.shuffle(codes, way), 'scale': pad(scale).astype(_scale_dtype(q.spec))}
  if offset is not None:
    arrays['offset'] = pad(offset)
  return Prepared(arrays, q.spec, (k, n), LAYOUT)


def matmul(x: Float[Array, 'm k'], p: Prepared, tiles: Tiles | None = None, interpret=False) -> Float[Array, 'm n']:
  """x @ p.

  Args:
    x: bf16[m, k].
    p: a QArray[k, n] that `prepare` rearranged.
    tiles: by tiles_gpu.heuristic if not given.
    interpret: runs the kernel on the CPU if True, or plgpu.InterpretGPUParams to say how.

  Returns:
    bf16[m, n].
  """
  if p.layout != LAYOUT:
    raise ValueError(f'The weight is in layout {p.layout!r}; this kernel reads {LAYOUT!r}. Prepare its QArray again.')
  if why := unsupported(x, p):
    raise NotImplementedError(f'Hopper does not multiply {x.shape} by {p.spec} here: {why}. Decode the weight.')
  if tiles is None and x.shape[0] > KERNEL_ROWS:
    return x @ decode(p, x.dtype)
  tiles = tiles or tiles_gpu.heuristic(x.shape[0], p)
  if why := tiles_gpu.unfit(p, tiles):
    raise ValueError(f'{why}. Give other tiles, or none.')
  return _matmul(x, p, tiles, pipeline_gpu.params(interpret))


@functools.partial(jax.jit, static_argnames='dtype')
def decode(p: Prepared, dtype=jnp.bfloat16) -> Float[Array, 'k n']:
  """The numbers of a prepared weight, in one pass over it."""
  way, (k, n) = unpack_gpu.unpacking(p.spec.format), p.shape
  codes = unpack_gpu.unshuffle(p.arrays['codes'], way)                   # [n, k], padded.
  group = tiles_gpu.group_size(p)
  numbers = way.numbers(codes).reshape(codes.shape[0], -1, group)        # [n, k / group, group]
  numbers = numbers * p.arrays['scale'].astype(jnp.float32).T[:, :, None]
  if 'offset' in p.arrays:
    numbers = numbers + p.arrays['offset'].T[:, :, None]
  return numbers.reshape(codes.shape)[:n, :k].T.astype(dtype)


def _scale_dtype(spec):
  exact = spec.block is None or spec.scale is not None and spec.scale.block is None and (
      spec.scale.format in (formats.E8M0, formats.BF16, formats.FP8_E4M3, formats.FP8_E5M2))
  return jnp.bfloat16 if exact else jnp.float32


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def _matmul(x, p, tiles, interpret):
  """The kernel, and what XLA does around it: padding, sums of x, the sum over splits."""
  (m, k), n = x.shape, p.shape[1]
  after, way = tiles_gpu.after(p, tiles), unpack_gpu.unpacking(p.spec.format)
  codes, offset, group = p.arrays['codes'], p.arrays.get('offset'), tiles_gpu.group_size(p)
  x = jnp.pad(x, ((0, -m % tiles.rows), (0, codes.shape[1] - k)))
  streams, rest = {'x': x, 'codes': codes, 'scale': p.arrays['scale']}, None
  if after and (way.bias or offset is not None):
    streams['sums'] = groups_.sums(x, min(group, tiles.depth)).T
  if after and offset is not None:
    streams['offset'] = offset
  elif offset is not None:
    streams['zeros'], rest = _whole_zeros(way, p)
  step = _interpreted if interpret else _scale_sums if after else _scale_weights
  work = pipeline_gpu.Work(functools.partial(step, way, group, after),
                           functools.partial(_specs, tuple(streams), way, group),
                           sums=None if after or interpret else jnp.float32)
  y = pipeline_gpu.call(
      work, tiles, (x.shape[0], *codes.shape), list(streams.values()), interpret=interpret,
      dtype=jnp.bfloat16 if tiles.splits == 1 and rest is None else jnp.float32)
  y = y[0] if tiles.splits == 1 else jnp.sum(y, axis=0)
  if rest is not None:
    y = y + jnp.dot(groups_.sums(x, group), rest, precision=jax.lax.Precision.HIGHEST)
  return y[:m, :n].astype(x.dtype)


def _whole_zeros(way, p):
  """Offsets as zeros, which are taken from codes before these are scaled and rounded, and what is left for XLA to add.

  Returns:
    bf16[k / group, n], whole numbers that bf16 holds with the bias added, and f32[k / group, n], or None if it is 0.
  """
  scale, offset = p.arrays['scale'].astype(jnp.float32), p.arrays['offset']
  most = 256 - way.bias
  zeros = jnp.clip(jnp.round(-offset * qarray.reciprocal(scale)), -most, most)
  whole = isinstance(p.spec.zero, qarray.Zero) and isinstance(p.spec.zero.format, formats.Int)
  return zeros.astype(jnp.bfloat16), None if whole or p.spec.zero is None else offset + zeros * scale


def _specs(streams, way, group, place):
  """What a step reads of each of the streams."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  tiles = place.tiles
  depth, parts, run = tiles.depth, max(tiles.depth // group, 1), min(group, tiles.depth)
  by_group = lambda k: (place.step(k) // max(group // depth, 1), place.column)
  specs = {'x': pipeline_gpu.swizzled((tiles.rows, depth), 16, lambda k: (place.row, place.step(k)), run),
           'codes': pipeline_gpu.swizzled((tiles.width, depth), way.bits, lambda k: (place.column, place.step(k))),
           'sums': plgpu.BlockSpec((parts, tiles.rows), lambda k: (place.step(k), place.row))}
  return [specs[name] if name in specs else plgpu.BlockSpec((parts, tiles.width), by_group) for name in streams]


def _scale_sums(way, group, _, place, x, codes, scale, *rest):
  """One step: each group's product, times its scale, is added to the sums in registers."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu
  *sums_offset, y = rest
  weights, run = _weights(way, group, place, codes, exact=False), min(group, place.tiles.depth)

  def multiply(*products):
    for g, (product, weight) in enumerate(zip(products, weights)):
      plgpu.wgmma(product, weight, x.at[:, g * run:(g + 1) * run].T)
    plgpu.wgmma_wait(0)
    return [product[...] for product in products]

  products = pl.run_scoped(multiply, *[plgpu.ACC(y.shape, jnp.float32)] * len(weights))
  vector = lambda ref, axis: pipeline_gpu.vector(ref, y.shape, axis)
  for g, product in enumerate(products):
    if way.bias:
      product = product - way.bias * vector(sums_offset[0].at[g], 1)
    y = y + product * vector(scale.at[g, place.own], 0)
    if len(sums_offset) == 2:
      y = y + vector(sums_offset[0].at[g], 1) * vector(sums_offset[1].at[g, place.own], 0)
  return y


def _scale_weights(way, group, _, place, x, codes, scale, *rest):
  """One step: weights are scaled, in bf16, and wgmma adds to the sums."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  *zeros, y = rest
  run = min(group, place.tiles.depth)
  vector = lambda ref, shape: pipeline_gpu.vector(ref.at[g, place.own], shape, 0, jnp.bfloat16)
  for g, weight in enumerate(_weights(way, group, place, codes, exact=not zeros)):
    if zeros:
      weight = weight - (vector(zeros[0], weight.shape) + way.bias)
    weight = weight * vector(scale, weight.shape)
    plgpu.wgmma(y, weight, x.at[:, g * run:(g + 1) * run].T)
  plgpu.wgmma_wait(0)
  return y


def _weights(way, group, place, codes, exact):
  """The step's weights in registers, group by group: bf16[columns, group]."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  tiles = place.tiles
  loaded = plgpu.load(codes.at[place.own], layout=unpack_gpu.loaded(way))
  unpack = unpack_gpu.in_registers(way, tiles.columns, tiles.depth, max(tiles.depth // group, 1), exact)
  return unpack(loaded)


def _interpreted(way, group, after, place, x, codes, scale, *rest):
  """The same step in jnp: interpret mode knows no registers."""
  *others, y = rest                                                      # Sums and offset, or zeros, or none.
  run, dot = min(group, place.tiles.depth), functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  weights = way.numbers(unpack_gpu.unshuffle(codes[place.own], way))
  column = lambda ref, g: ref[g, place.own].astype(jnp.float32)[:, None]
  for g in range(weights.shape[1] // run):
    weight, inputs = weights[:, g * run:(g + 1) * run], x[:, g * run:(g + 1) * run].astype(jnp.float32)
    if not after:
      weight = weight - column(others[0], g) if others else weight
      y = y + dot((weight * column(scale, g)).astype(jnp.bfloat16).astype(jnp.float32), inputs.T)
      continue
    product = dot(weight + way.bias, inputs.T)
    if way.bias:
      product = product - way.bias * others[0][g][None]
    y = y + product * column(scale, g)
    if len(others) == 2:
      y = y + others[0][g][None] * column(others[1], g)
  pipeline_gpu.interpreted_reads_are_done()
  return y
