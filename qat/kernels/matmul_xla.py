"""The definition of a product with a weight on a grid, in plain XLA, and two forms of it that keep the weight in codes.

All are x @ decode(q), summed in f32. They differ in rounding: `decoded` and `sliced` round each weight to the dtype of
x first, `grouped` multiplies by the scales after the sum over a group.
"""

import math

import jax
import jax.numpy as jnp

from qat.core import formats, qarray
from qat.kernels import block_scaled, float8, groups as groups_, integer

SLICE_NUMBERS = 2**20  # That `sliced` decodes at a time: 2 MiB in bfloat16, less than a GPU's L2 cache.
SLICED_ROWS = 256      # Beyond, the weight is decoded once. Not tuned: no GPU has timed it.


def decoded(x, q):
  """x @ decode(q), the definition.

  Args:
    x: float[*batch, *rows, k].
    q: QArray[*batch, k, n].

  Returns:
    [*batch, *rows, n], in the dtype of x.
  """
  return product(x, numbers(q, x.dtype))


def product(x, w):
  """x @ w of floats: [*batch, *rows, k], [*batch, k, n] -> [*batch, *rows, n], in the dtype of x."""
  return qarray.cast(_dot(x, w, (x.ndim - 1, w.ndim - 2)), x.dtype)


def transposed(dy, w):
  """dy @ w^T, the gradient of x: [*batch, *rows, n], [*batch, k, n] -> [*batch, *rows, k], in the dtype of dy."""
  return qarray.cast(_dot(dy, w, (dy.ndim - 1, w.ndim - 1)), dy.dtype)


def numbers(q, dtype):
  """decode(q) for stacked matrices, whose Flat blocks know two axes: dtype[*lead, k, n]."""
  decode = lambda q: qarray.decode(q, dtype)
  for _ in range(q.ndim - 2):
    decode = jax.vmap(decode)
  return decode(q)


def _dot(x, w, contract):
  batch = tuple(range(w.ndim - 2))
  dims = (tuple((axis,) for axis in contract), (batch, batch))
  return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def grouped(x, q):
  """x @ decode(q) with groups as a batch axis and scales after the sums: no decoded weight on GPUs.

  XLA fuses the cast of the codes into the product, and the scales into the sum over groups. It writes f32[G, m, n],
  which is less than the weight in bf16 while m G is less than k / 2.

  Args:
    x: float[*rows, k].
    q: QArray[k, n], in groups of inputs.

  Returns:
    [*rows, n], in the dtype of x.
  """
  w = groups_.of(q)
  k, n = w.shape
  rows = math.prod(x.shape[:-1])
  xg = x.reshape(rows, k // w.size, w.size)                              # [m, G, g]
  codes = values(w, x.dtype).reshape(k // w.size, w.size, n)             # [G, g, n]
  partial = jax.lax.dot_general(xg, codes, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32)
  y = jnp.sum(partial * w.scale[:, None], axis=0)                        # [G, m, n] -> [m, n]
  if w.offset is not None:
    y = y + groups_.sums(xg.reshape(rows, k), w.size) @ w.offset
  return qarray.cast(y, x.dtype).reshape(*x.shape[:-1], n)


def values(w, dtype):
  """What the codes stand for in the format's units, in `dtype`: integers of 8 bits are exact in bfloat16."""
  if isinstance(w.format, formats.Int | formats.Binary):
    signed = w.codes.dtype == jnp.uint8 and w.format.max <= 127  # XLA on GPU fuses the cast of signed ones.
    return (jax.lax.bitcast_convert_type(w.codes, jnp.int8) if signed else w.codes).astype(dtype)
  return w.format.decode(w.codes).astype(dtype)


def sliced(x, q):
  """x @ decode(q), some inputs at a time, as `grouped` takes and gives: no more is decoded at once than a slice."""
  w = groups_.of(q)
  k, n = w.shape
  rows, count = math.prod(x.shape[:-1]), slices(w)
  each = max(count * w.size // k, 1)                                     # Slices of a group.
  parts = lambda a: None if a is None else jnp.repeat(a, each, axis=0).reshape(count, -1, n)
  spread = lambda a: jnp.repeat(a, k // count // a.shape[0], axis=0)

  def add(y, part):
    x, codes, scale, offset = part
    numbers = w.format.decode(codes) * spread(scale)
    numbers = (numbers if offset is None else numbers + spread(offset)).astype(x.dtype)
    return y + jax.lax.dot(x, numbers, preferred_element_type=jnp.float32), None

  columns = x.reshape(rows, count, k // count).swapaxes(0, 1)
  codes = w.codes.reshape(count, k // count, n)
  y, _ = jax.lax.scan(add, jnp.zeros((rows, n), jnp.float32), (columns, codes, parts(w.scale), parts(w.offset)))
  return qarray.cast(y, x.dtype).reshape(*x.shape[:-1], n)


def slices(w):
  """How many slices of inputs `sliced` makes of a Groups: the fewest that are small, and of whole groups or in one."""
  k, n = w.shape
  fits = lambda c: k % c == 0 and 0 in (k // c % w.size, w.size % (k // c))
  return next((c for c in range(1, k + 1) if fits(c) and k // c * n <= SLICE_NUMBERS), k)


def best(x, q):
  """x @ decode(q), in the form that is fast on this process' default device."""
  if jax.default_backend() != 'gpu' or q.ndim != 2:                      # XLA on TPU fuses the decoding.
    return decoded(x, q)
  return form(x, q)(x, q)


def form(x, q):
  """The form of a product by a matrix that is meant for GPUs: `grouped`, `sliced` or `decoded`."""
  size = groups_.group_size(q.spec, q.shape)
  rows, k = math.prod(x.shape[:-1]), x.shape[-1]
  if isinstance(size, str) or rows > SLICED_ROWS:
    return decoded
  # XLA fuses the cast of integers into a product, and no table; it writes f32[G, m, n], to be less than 8-bit codes.
  return grouped if isinstance(q.spec.format, formats.Int | formats.Binary) and 4 * rows * (k // size) < k else sliced


def codes_by_codes(x, w):
  """x @ w of two QArrays, in the units of their codes as far as their scales let it.

  Args:
    x: QArray[m, k].
    w: QArray[k, n].

  Returns:
    f32[m, n].
  """
  if integer.fit(x, w):
    return integer.matmul(x, w)
  if float8.fit(x, w):
    return float8.matmul(x, w)
  if block_scaled.available() and block_scaled.fit(x, w):
    return block_scaled.matmul(x, w)
  if integer.fits(x, -1) and x.zero is None and x.spec.format.max <= 127 and _is_whole(w):
    return _integer_groups(x, w)
  return decoded(qarray.decode(x), w)


def _is_whole(w):
  return isinstance(w.spec.format, formats.Int | formats.Binary) and not isinstance(
      groups_.group_size(w.spec, w.shape), str)


def _integer_groups(x, w):
  """Exact int32 sums of each group, then the scales: [m, k], [k, n] -> f32[m, n]."""
  g = groups_.of(w)
  (m, k), n = x.shape, w.shape[-1]
  down = 128 if g.format.max > 127 else 0                                # Unsigned 8 bits do not fit in int8.
  a = x.codes.astype(jnp.int8).reshape(m, k // g.size, g.size)           # [m, G, g]
  b = (g.codes.astype(jnp.int32) - down).astype(jnp.int8).reshape(k // g.size, g.size, n)
  part = jax.lax.dot_general(a, b, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32)
  part = part + down * jnp.sum(a, axis=2, dtype=jnp.int32).T[:, :, None]  # [G, m, n]
  y = jnp.sum(part.astype(jnp.float32) * g.scale[:, None], axis=0)
  if g.offset is not None:
    y = y + groups_.sums(x.codes, g.size) @ g.offset
  return qarray.exact(y) * qarray.decode(x.scale).reshape(-1, 1)


def ragged(x, q, sizes):
  """Rows by their experts: x[i] @ decode(q)[e], where rows are sorted by expert and `sizes` counts them.

  Args:
    x: float[m, k].
    q: QArray[e, k, n].
    sizes: i32[e], which add up to m.

  Returns:
    [m, n], in the dtype of x.
  """
  y = jax.lax.ragged_dot(x, numbers(q, x.dtype), sizes, preferred_element_type=jnp.float32)
  return qarray.cast(y, x.dtype)
