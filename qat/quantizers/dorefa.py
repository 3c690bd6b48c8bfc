"""DoReFa-Net: k-bit weights, activations and gradients.

Zhou et al. DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients, 2016. https://arxiv.org/abs/1606.06160. quantize_k(r) = round((2^k - 1) r) / (2^k - 1).
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import blocks, formats, qarray
from qat.quantizers import base, static, streams


class DoReFaWeight(base.Quantizer):
  """2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1  (Eq. 9), and for one bit sign(w) E|w| (Eq. 8).

  The maximum, and the mean, run over the matrix. The gradient passes the rounding straight through and
  follows the rest, tanh and maximum, exactly.
  """

  def __init__(self, bits):
    one = qarray.Spec(formats.BINARY, (None, None))
    many = qarray.Spec(formats.Int(bits, signed=False), (None, None), zero=qarray.Min())
    self.spec = one if bits == 1 else many

  def grid(self, x):
    if self.spec.format == formats.BINARY:
      return blocks.over_blocks(blocks.mean, jnp.abs(x.astype(jnp.float32)), self.spec.block), None
    ones = jnp.ones(blocks.scale_shape(self.spec.block, x.shape), jnp.float32)
    return qarray.from_range(-ones, ones, self.spec)

  def prepare(self, x):
    if self.spec.format == formats.BINARY:
      return x
    squashed = jnp.tanh(x.astype(jnp.float32))
    top = blocks.over_blocks(jnp.max, jnp.abs(squashed), self.spec.block)
    return squashed * blocks.spread(qarray.reciprocal(top), self.spec.block, x.shape)

  def __call__(self, x):
    x_hat = qarray.fake(self.prepare(x), self.spec, *self.grid(x))
    return base.straight_through(self.prepare(x), x_hat).astype(x.dtype)


class DoReFaInput(base.Quantizer):
  """quantize_k(clip(x, 0, 1))  (Sec. 2.4). The gradient is zero where x is clipped."""

  def __init__(self, bits):
    self.spec = qarray.Spec(formats.Int(bits, signed=False), (...,))

  def grid(self, x):
    return jnp.full((1,) * x.ndim, 1 / self.spec.format.max, jnp.float32), None

  def __call__(self, x):
    x_hat = qarray.fake(x, self.spec, *self.grid(x))
    return static.clipped_straight_through(x, x_hat, (x >= 0) & (x <= 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantize_gradient(x, key, bits):
  """The identity; what comes back is rounded to `bits` bits (Eq. 12).

  f(g) = 2 m [quantize_k(g / (2 m) + 1/2 + n) - 1/2], m = max|g| over all axes but the first (one example),
  n uniform in +-1/2 / (2^k - 1): stochastic rounding.
  """
  del key, bits
  return x


def _forward(x, key, bits):
  return x, key


def _backward(bits, key, g):
  m = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)), keepdims=True)
  levels = 2.0**bits - 1
  unit = g * qarray.reciprocal(2 * m) + 0.5
  n = (jax.random.uniform(key, g.shape, g.dtype) - 0.5) / levels
  rounded = jnp.clip(jnp.round(qarray.exact((unit + n) * levels)), 0, levels) / levels
  return (2 * m * (rounded - 0.5)).astype(g.dtype), None


quantize_gradient.defvjp(_forward, _backward)


class DoReFaGradient(nnx.Module):
  """Passes x through and rounds the gradient that comes back. A Rule's `gradient`."""

  def __init__(self, bits, seed=0):
    self.bits, self.stream = bits, streams.Stream(jax.random.key(seed))

  def for_input(self, lead):
    """The quantizer of one layer's gradients; `lead` as for Quantizer.for_input."""
    new = nnx.clone(self)
    new.stream = self.stream.stacked(lead)
    return new

  def __call__(self, x):
    return quantize_gradient(x, self.stream(), self.bits)

  def advance(self):
    """Goes on to the next draw: at the end of the layer's call."""
    self.stream.advance()
