"""Products by a low-bit weight on the CPU: codes become numbers in registers, and no decoded weight in memory.

    y[m, n] = sum over groups g of scale[g, n] (x_g @ value(codes_g)) + offset[g, n] sum(x_g)

Up to 16 rows, four of them at a time read each code and look its value up in a table that a register holds. More rows
share panels of decoded numbers, which stay in a core's cache. Products of codes sum int8 in int32, exactly. The loops,
and the layout that they read, are in cpu/matmul.cc. Sums are f32, in another order than XLA's; the threads are XLA's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import blocks, formats, qarray
from qat.kernels import groups as groups_
from qat.kernels import integer
from qat.kernels.cpu import library
from qat.kernels.cpu.encoding import encoding
from qat.kernels.prepared import Prepared

LAYOUT = 'cpu/1'
PANEL = 16  # Outputs that lie side by side.


def unsupported(x, w):
  """Why x @ w cannot run here, or None.

  Args:
    x: float[*rows, k] or QArray[*rows, k]; arrays may be shapes only.
    w: QArray[k, n] or Prepared; likewise.
  """
  if w.ndim != 2 or not x.shape or x.shape[-1] != w.shape[0]:
    return f'x[*rows, k] is multiplied by w[k, n], and the shapes are {tuple(x.shape)} and {tuple(w.shape)}'
  return _unsupported_input(x, w) or _unstored(w.spec, w.shape) or _unbuilt()


def _unsupported_input(x, w):
  if isinstance(x, qarray.QArray):
    if _whole(x.spec, x.shape, -1) and _whole(w.spec, w.shape, -2):
      return None
    return (f'a product of codes is one of integers whose scales, and zeros, do not change along the inputs, not of '
            f'{x.spec} and {w.spec}')
  return None if x.dtype in (jnp.float32, jnp.bfloat16) else f'x is float32 or bfloat16, not {x.dtype}'


def _whole(spec, shape, axis):
  """integer.fits, of shapes alone."""
  integers = isinstance(spec.format, formats.Int | formats.Binary) and isinstance(spec.block, tuple)
  zero = spec.zero is None or (isinstance(spec.zero, qarray.Zero) and spec.zero.format is not None)
  return integers and zero and blocks.scale_shape(spec.block, shape)[axis] == 1


def _unstored(spec, shape):
  size = groups_.group_size(spec, shape)
  form = size if isinstance(size, str) else encoding(spec, size)
  return form if isinstance(form, str) else None


def _unbuilt():
  levels = library.load()
  return str(levels) if isinstance(levels, library.Unbuilt) else None


def prepare(q: qarray.QArray) -> Prepared:
  """The weight in panels of 16 outputs, each group of inputs in whole words.

  Args:
    q: QArray[k, n].

  Returns:
    Prepared of codes u32[n / 16, words, 16], scale and offset f32[n / 16, G, 16]; and of integers with one scale an
    output zero and sums, what is taken from a field and what an output's codes add up to: i32[n / 16, 1, 16].
  """
  why = f'it is no matrix, but of shape {tuple(q.shape)}: use jax.vmap' if q.ndim != 2 else _unstored(q.spec, q.shape)
  if why:
    raise ValueError(f'A weight of {q.spec} is prepared for the CPU, which it cannot be: {why}. Keep the QArray.')
  return _prepare(q)


@jax.jit
def _prepare(q):
  w = groups_.of(q)
  form = encoding(q.spec, w.size)
  bad = ~jnp.isfinite(w.format.decode(w.codes)).reshape(-1, w.size, w.shape[1]).all(axis=1)
  arrays = dict(codes=_words(form.fields(w.codes, w.format), form, w.size),
                scale=_panels(jnp.where(bad, jnp.nan, w.scale)))         # The loops know no float8 NaN.
  if w.offset is not None:
    arrays['offset'] = _panels(w.offset + (form.center - (form.shift or 0)) * w.scale if form.center else w.offset)
  if _whole(q.spec, q.shape, -2):
    zero = jnp.zeros((1, 1), jnp.int32) if q.zero is None else qarray.decode(q.zero).astype(jnp.int32)
    zero = jnp.broadcast_to(zero, (1, w.shape[1]))
    arrays['zero'] = _panels(zero + form.shift)
    arrays['sums'] = _panels(jnp.sum(w.codes.astype(jnp.int32) - zero, axis=0, keepdims=True))
  return Prepared(arrays, q.spec, q.shape, LAYOUT)


def _words(fields, form, size):
  """u32[k, n] -> u32[n / 16, words, 16]."""
  k, n = fields.shape
  fields = jnp.pad(fields.reshape(k // size, size, n), ((0, 0), (0, form.padded(size) - size), (0, -n % PANEL)))
  fields = fields.reshape(-1, *form.bit().shape, fields.shape[-1])       # [words, parts, 4, n]
  words = jnp.sum(fields << form.bit()[None, :, :, None], axis=(1, 2), dtype=jnp.uint32)
  return _panels(words)


def _panels(a):
  """[G, n] -> [n / 16, G, 16]."""
  a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % PANEL)))
  return jnp.swapaxes(a.reshape(len(a), -1, PANEL), 0, 1)


def _unpanels(a, n):
  """[n / 16, G, 16] -> [G, n]."""
  return jnp.swapaxes(a, 0, 1).reshape(a.shape[1], -1)[:, :n]


def decode(p, dtype=jnp.float32):
  """The numbers of a Prepared: dtype[k, n]."""
  k, n = p.shape
  size = groups_.group_size(p.spec, p.shape)
  form = encoding(p.spec, size)
  words = _unpanels(p.arrays['codes'], n)                                # [words, n]
  fields = words[:, None, None, :] >> form.bit()[None, :, :, None] & np.uint32(2**form.bits - 1)
  values = form.values(fields).reshape(k // size, -1, n)[:, :size]
  w = qarray.exact(values * _unpanels(p.arrays['scale'], n)[:, None])
  if 'offset' in p.arrays:
    w = w + _unpanels(p.arrays['offset'], n)[:, None]
  return qarray.cast(w.reshape(k, n), dtype)


def matmul(x, p, level=None):
  """x @ p.

  Args:
    x: f32 or bf16[*rows, k], or QArray[*rows, k] of integers.
    p: Prepared[k, n].
    level: of instructions, one of `library.load()`; the last if not given.

  Returns:
    [*rows, n], in the dtype of x; or f32 for a QArray, and then integer.matmul's to the bit.
  """
  if p.layout != LAYOUT:
    raise ValueError(f'A weight in the layout {p.layout!r} is given to the CPU kernels, which read {LAYOUT!r}. '
                     'Prepare it again, by matmul_cpu.prepare.')
  if why := unsupported(x, p):
    raise NotImplementedError(f'The CPU kernels cannot run x @ w: {why}.')
  return _integers(x, p, level) if isinstance(x, qarray.QArray) else _floats(x, p, level)


def _floats(x, p, level):
  k, n = p.shape
  size = groups_.group_size(p.spec, p.shape)
  form = encoding(p.spec, size)
  y = _call('qat_multiply', (math.prod(x.shape[:-1]), n), jnp.float32, level)(
      _padded(x.astype(jnp.float32).reshape(-1, k), size, form), p.arrays['codes'], p.arrays['scale'],
      p.arrays.get('offset', jnp.zeros((0, 0, 0), jnp.float32)),  # NumPy's ends jaxlib 0.11 inside shard_map.
      levels=np.asarray(form.levels, np.float32), bits=np.int32(form.bits))
  return qarray.cast(y, x.dtype).reshape(*x.shape[:-1], n)


def _integers(x, p, level):
  k, n = p.shape
  form = encoding(p.spec, k)
  codes, zero = integer.int8(x)
  y = _call('qat_integer_sums', (math.prod(x.shape[:-1]), n), jnp.int32, level)(
      _padded(codes.reshape(-1, k), k, form), p.arrays['codes'], p.arrays['zero'], bits=np.int32(form.bits))
  y = y.reshape(*x.shape[:-1], n)
  outputs = lambda name: _unpanels(p.arrays[name], n).reshape((1,) * (x.ndim - 1) + (n,))
  if zero is not None:                                                   # (a - za) b summed over k = ab - za sum(b).
    y = y - zero * outputs('sums')
  return qarray.exact(y.astype(jnp.float32) * qarray.decode(x.scale) * outputs('scale'))


def _padded(x, size, form):
  """[m, k], each group of inputs to whole words."""
  short = form.padded(size) - size
  if not short:
    return x
  m, k = x.shape
  return jnp.pad(x.reshape(m, k // size, size), ((0, 0), (0, 0), (0, short))).reshape(m, -1)


def _call(name, shape, dtype, level):
  """The custom call, at one level of instructions."""
  levels = library.load()
  if level is not None and level not in levels:
    raise NotImplementedError(f'level={level!r}: this CPU runs {levels}. Pick one of them, or None for the last.')
  number = levels.index(level or levels[-1])
  call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, dtype), vmap_method='expand_dims')
  return functools.partial(call, level=np.int32(number))
