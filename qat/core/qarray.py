"""QArray: codes, and the scales and zeros that give them meaning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, rounding as rounding_
from qat.core.rounding import Arrays, exact


@dataclasses.dataclass(frozen=True)
class Zero:
  """Offsets in units of the codes: x = (codes - zero) * scale. GPTQ, AWQ, ONNX, LiteRT."""
  format: formats.Format | None = None  # None: float32, as in HQQ.

  @property
  def spec(self):
    return self.format and Spec(self.format, None)

  def fit(self, low, scale, format):
    """The zero at which the lowest code stands for `low`."""
    return format.min - exact(low * reciprocal(scale))

  def units(self, x, inverse, zero, rounding):
    """`x` in units of the codes. A whole zero is added after rounding, as ONNX does."""
    u = exact(x * inverse)
    return u + zero if self.format is None else rounding(u) + zero

  def numbers(self, value, scale, zero):
    return (value - zero) * scale


@dataclasses.dataclass(frozen=True)
class Min:
  """Offsets in units of the numbers: x = codes * scale + min. GGUF's Q4_1 and K-quants."""
  spec: 'Spec | None' = None  # None: float32.

  def fit(self, low, scale, format):
    return low - exact(format.min * scale)

  def units(self, x, inverse, zero, rounding):
    return (x - zero) * inverse

  def numbers(self, value, scale, zero):
    return exact(value * scale) + zero


@dataclasses.dataclass(frozen=True)
class Spec:
  """How an array sits on a grid: a format, the block that shares a scale, and the scale's own grid.

  `block` is a tuple over the trailing axes, or a Flat (see core/blocks.py). A block of None means
  no scale: the numbers are already in the format's units. A scale is an array, so `scale` may put
  it on a grid of its own, and so may `zero`, an offset to each block.

  >>> Spec(formats.FP4_E2M1, (32,), Spec(formats.E8M0, None))           # OCP's MXFP4
  Spec(FP4_E2M1, (32,), scale=Spec(E8M0, None))
  """
  format: formats.Format
  block: Any  # tuple, Flat or None: checked below.
  scale: 'Spec | None' = None  # None: float32.
  zero: Zero | Min | None = None

  def __post_init__(self):
    if not isinstance(self.format, formats.Format):
      raise TypeError(f'Spec.format {self.format!r} is a {type(self.format).__name__}, and no format. '
                      'Pick one of qat.formats, such as formats.INT4.')
    for field, kinds, example in (('scale', Spec, 'specs.E8M0'), ('zero', (Zero, Min), 'qat.Zero(formats.UINT4)')):
      value = getattr(self, field)
      if value is not None and not isinstance(value, kinds):
        raise TypeError(f'Spec.{field} {value!r} is a {type(value).__name__}. Give None for float32, or a value such '
                        f'as {example}.')
    if self.block is not None and not isinstance(self.block, (tuple, blocks.Flat)):
      raise TypeError(f'Spec.block {self.block!r} is a {type(self.block).__name__}: a block is a tuple '
                      "over the trailing axes, a Flat, or None. Write (32,) for runs of 32.")
    sizes = self.block if isinstance(self.block, tuple) else ()
    sizes = sizes[1:] if sizes[:1] == (...,) else sizes
    if not all(b is None or (isinstance(b, int) and b > 0) for b in sizes):
      raise ValueError(f'Spec.block {self.block}: an entry is a size of 1 or more, or None for the whole axis; the '
                       'first may be ... for all leading axes. Write (32,), (None, 1) or (...,).')

  def __repr__(self):
    rest = f', scale={self.scale}' * (self.scale is not None) + f', zero={self.zero}' * (self.zero is not None)
    block = str(self.block).replace('Ellipsis', '...')
    return f'Spec({self.format}, {block}{rest})'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
  """An array on a grid. `decode` gives its numbers, in f32."""
  codes: Any       # Array[*shape], in the format's storage type (also shapes only, or shardings: a pytree).
  scale: Any       # Array, QArray or None: [*shape / block].
  zero: Any        # Likewise; broadcasts to the scale's shape.
  spec: Spec = dataclasses.field(metadata=dict(static=True))

  shape = property(lambda self: self.codes.shape)
  ndim = property(lambda self: self.codes.ndim)
  size = property(lambda self: self.codes.size)

  @property
  def nbits(self):
    """Bits of storage, when codes are packed."""
    return sum(a.nbits if isinstance(a, QArray) else 8 * a.dtype.itemsize * a.size
               for a in (self.scale, self.zero) if a is not None) + self.spec.format.bits * self.codes.size


def reciprocal(scale: Float[Arrays, '*s']) -> Float[Array, '*s']:
  """1 / scale, and 0 where the scale is 0.

  Encoding multiplies by it, and never divides: XLA rewrites some divisions by a broadcast array,
  and all divisions by a constant, into such a product. It also rewrites 1 / (a / b) as b / a, if it
  sees both; `exact` hides where the scale comes from.
  """
  safe = exact(jnp.where(scale == 0, jnp.ones_like(scale), scale))
  return jnp.where(scale == 0, jnp.zeros_like(scale), 1 / safe)


def divide(x, divisor):
  """x / divisor for a constant, as the device divides: on CPU as IEEE 754 rounds it.

  XLA would multiply by 1 / divisor, and would merge the quotient that `x` may be into this one. On NVIDIA GPUs it
  divides by `div.full` and `rcp.approx`: a scale found there may differ from a CPU's in its last bits.
  """
  return exact(x) / jnp.where(x == x, jnp.asarray(divisor, x.dtype), jnp.ones_like(x))


def apart(x):
  """x, to the bit, from a kernel of its own.

  What training computes and a frozen model has stored would else be fused with its readers in one program, and not in
  the other, and LLVM then contracts other additions there. XLA never copies a division into its readers.
  """
  return x / jnp.where(x == x, jnp.ones_like(x), jnp.full_like(x, 2))    # By 1: x is finite.


def encode(x: Float[Arrays, '*shape'], spec: Spec, scale=None, zero=None, rounding=rounding_.half_even) -> QArray:
  """Rounds `x` to the grid of `spec`.

  Args:
    x: float[*shape], whose trailing axes `spec.block` tiles.
    spec: the grid.
    scale: [*shape / block], put on the grid of `spec.scale`; the smallest that clips nothing if
      not given (core/ranges.py has other rules).
    zero: likewise, where there is a `spec.zero`.
    rounding: a function of core/rounding.py.

  Returns:
    QArray[*shape].

  >>> q = encode(jnp.array([[0.5, -3.5, 7.0, 1.4]]), Spec(formats.INT4, block=(None,)))
  >>> q.codes
  Array([[0, -4, 7, 1]], dtype=int4)
  >>> decode(q)
  Array([[ 0., -4.,  7.,  1.]], dtype=float32)
  """
  _check(x, spec)
  return _traced_once(_encode, rounding)(x, scale, zero, spec, rounding)


def fake(x: Float[Arrays, '*shape'], spec: Spec, scale=None, zero=None,
         rounding=rounding_.half_even) -> Float[Array, '*shape']:
  """decode(encode(x, ...)), bit for bit, in the dtype of `x` and without making codes."""
  _check(x, spec)
  return _traced_once(_fake, rounding)(x, scale, zero, spec, rounding)


def _check(x, spec):
  """Raises unless `x` is an array of real numbers and `spec` a Spec."""
  if not isinstance(spec, Spec):
    raise TypeError(f'The grid {spec!r} is a {type(spec).__name__}, and no Spec. Give a qat.Spec, or one of qat.specs.')
  if not hasattr(x, 'dtype'):
    what = 'which has codes already: qat.decode it first' if isinstance(x, QArray) else 'and no array: give a jax.Array'
    raise TypeError(f'What is put on {spec} is a {type(x).__name__}, {what}.')
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(f'An array of {x.dtype} is put on {spec}, whose numbers are real. Encode x.real and x.imag each.')


def _traced_once(f, rounding):
  """`f` under jit, so that a model of equal layers traces it once; a random key is no static argument."""
  return f.__wrapped__ if isinstance(rounding, rounding_.Stochastic) else f


@functools.partial(jax.jit, static_argnums=(3, 4))
def _encode(x, scale, zero, spec, rounding):
  x = x.astype(jnp.float32)
  if spec.block is None:
    return QArray(spec.format.encode(x, rounding), None, None, spec)
  scale, zero = place(x, spec, scale, zero)
  u = units(x, spec, scale, zero, rounding)
  return QArray(spec.format.encode(u, rounding), scale, zero, spec)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _fake(x, scale, zero, spec, rounding):
  v = x.astype(jnp.float32)
  if spec.block is None:
    return cast(spec.format.round(v, rounding), x.dtype)
  scale, zero = (decode(a) for a in place(v, spec, scale, zero))
  value = spec.format.round(units(v, spec, scale, zero, rounding), rounding)
  return cast(_numbers(value, spec, scale, zero), x.dtype)


def decode(q, dtype=jnp.float32):
  """dtype[*shape]. An array that is not a QArray, or None, is returned as it is.

  >>> decode(encode(jnp.array([[0.1, -1.0, 3.0]]), Spec(formats.FP4_E2M1, (None,))))
  Array([[ 0., -1.,  3.]], dtype=float32)
  """
  return _decode(q, jnp.dtype(dtype)) if isinstance(q, QArray) else q


@functools.partial(jax.jit, static_argnums=1)
def _decode(q, dtype):
  value = q.spec.format.decode(q.codes)
  if q.spec.block is not None:
    value = _numbers(value, q.spec, decode(q.scale), decode(q.zero))
  return cast(value, dtype)


def cast(x: Float[Arrays, '*shape'], dtype) -> Float[Array, '*shape']:
  """`x` in `dtype`, rounded even where XLA would rather keep the excess precision."""
  if x.dtype == dtype:
    return x
  info = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def place(x, spec, scale=None, zero=None):
  """A scale and a zero for `x` on their own grids: each f32, a QArray, or None.

  Those not given are fitted: the smallest that clip nothing.
  """
  if scale is None:
    return absmax(x, spec)
  if (spec.zero is None) != (zero is None):
    raise ValueError(f'zero={zero} was given for {spec}, whose zero is {spec.zero}. '
                     'Give both, or neither.')
  return _on_grid(scale, spec.scale), _on_grid(zero, spec.zero and spec.zero.spec)


@functools.partial(jax.jit, static_argnums=1)
def absmax(x, spec):
  """The range rule that clips nothing: max|x| / format.max, or (max - min) / (levels - 1).

  Args:
    x: float[*shape].
    spec: a grid with a block.

  Returns:
    scale and zero, each [*shape / block] and on its own grid; zero is None without `spec.zero`.
  """
  x = x.astype(jnp.float32)
  if spec.zero is None and spec.format.min < 0:
    high = blocks.over_blocks(jnp.max, jnp.abs(x), spec.block)
    return from_range(-high, high, spec)
  return from_range(blocks.over_blocks(jnp.min, x, spec.block),
                    blocks.over_blocks(jnp.max, x, spec.block), spec)


def from_range(low, high, spec, under=(None, None)):
  """The scale and zero that spread the format over [low, high], each f32[*shape / block].

  Without a `spec.zero` the range is made symmetric; an unsigned format takes the sign of the end
  that is further from 0, as K-quants' minimums do. With a Zero, the range is widened to hold 0,
  which is then represented exactly. `under` is another scale and zero, whose own scales are kept.
  """
  if spec.zero is None:
    extreme = jnp.maximum(high, -low)
    if spec.format.min >= 0:
      extreme = jnp.where(-low > high, low, high)
    largest = spec.format.max or -spec.format.min                        # INT1 is {-1, 0}.
    return _on_grid(divide(extreme, largest), spec.scale, under[0]), None
  if isinstance(spec.zero, Zero):
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  scale = _on_grid(divide(high - low, spec.format.max - spec.format.min), spec.scale, under[0])
  return scale, _on_grid(spec.zero.fit(low, decode(scale), spec.format), spec.zero.spec, under[1])


def _on_grid(x, spec, under=None):
  """A scale or a zero on the grid of `spec`. Exponents are rounded up: nothing is clipped."""
  if spec is None or x is None or isinstance(x, QArray):
    return x
  up = isinstance(spec.format, formats.Exponent)
  rounding = rounding_.ceil if up else rounding_.half_even
  if under is None:
    return encode(x, spec, rounding=rounding)
  return encode(x, spec, under.scale, under.zero, rounding)


def units(x, spec, scale, zero, rounding=rounding_.half_even):
  """`x` in units of the format, before it is rounded and clipped: f32[*shape]."""
  x, scale, zero = x.astype(jnp.float32), decode(scale), decode(zero)
  inverse = blocks.spread(reciprocal(scale), spec.block, x.shape)
  if zero is None:
    return x * inverse
  zero = blocks.spread(jnp.broadcast_to(zero, scale.shape), spec.block, x.shape)
  return spec.zero.units(x, inverse, zero, rounding)


def _numbers(value, spec, scale, zero):
  """The format's values as numbers: f32[*shape]."""
  spread = lambda a: blocks.spread(a, spec.block, value.shape)
  if zero is None:
    return exact(value * spread(scale))
  return spec.zero.numbers(value, spread(scale), spread(jnp.broadcast_to(zero, scale.shape)))
