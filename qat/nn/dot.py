"""Products of a quantized input and a quantized weight.

Where both are integers and their scales do not change along the sum, the product is one of int8 codes
with int32 sums, in training as in serving: what is trained is, bit for bit, what is served. The
gradient is that of the product of the decoded operands. Other grids multiply decoded operands.
"""

import math

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.kernels import integer
from qat.nn import layouts
from qat.quantizers import base


def rows(x, contract, batch):
  """[*batch, *free, *contract], the last merged: the form in which inputs are quantized.

  Args:
    x: [*shape].
    contract: the axes that the product sums over.
    batch: the axes shared with the weight.
  """
  contract, batch = (tuple(a % x.ndim for a in axes) for axes in (contract, batch))
  free = tuple(a for a in range(x.ndim) if a not in contract + batch)
  x = jnp.transpose(x, batch + free + contract)
  lead = len(batch + free)
  return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def unrows(x, shape, contract, batch):
  """The inverse of `rows`, for an array of `shape`."""
  contract, batch = (tuple(a % len(shape) for a in axes) for axes in (contract, batch))
  order = batch + tuple(a for a in range(len(shape)) if a not in contract + batch) + contract
  x = x.reshape([shape[a] for a in order])
  return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))


@jax.jit  # Layers of one shape are traced, and differentiated, once.
@jax.custom_jvp
def integer_product(x_hat, w_hat, x, w):
  """The product of two integer QArrays, with the gradient of x_hat @ w_hat."""
  del x_hat, w_hat
  return integer.matmul(x, w)


@integer_product.__wrapped__.defjvp
def _integer_product_jvp(primals, tangents):
  (x_hat, w_hat, x, w), (dx, dw, *_) = primals, tangents
  tangent = float_product(dx, w_hat) + float_product(x_hat, dw)
  return integer_product(x_hat, w_hat, x, w), tangent


def float_product(x, w):
  """[*batch, *rows, k], [*batch, k, n] -> f32[*batch, *rows, n]."""
  batch = tuple(range(w.ndim - 2))
  dims = (((x.ndim - 1,), (w.ndim - 2,)), (batch, batch))
  return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def product(quantizers, x, w, weight, variable):
  """x @ w for an input in the form of `rows` and a quantized weight.

  Args:
    quantizers: the layer's.
    x: float[*batch, *rows, k].
    w: the weight as the layer read it, on its grid and in its own shape.
    weight: the weights.Weight of the layer, and `variable` what it reads.

  Returns:
    f32[*batch, *rows, *outputs], from exact sums of codes, if both grids are integers; else None.
  """
  if x.size == 0 or not isinstance(quantizers.input, base.Quantizer):  # What only watches, for calibration.
    return None
  x_hat, x_codes = quantizers.place(x, quantizers.input.both)
  w_codes = weight.encode(variable)
  if not (integer.fits(x_codes, -1) and integer.fits(w_codes, -2)):
    return None
  y = integer_product(x_hat, weight.layout.to_matrix(w), x_codes, w_codes)
  outputs = (weight.layout.shape[a] for a in weight.layout.outputs)
  return y.reshape(*y.shape[:-1], *outputs)


def dot_general(original, quantizers, weight, variable):
  """A `dot_general` for nnx.Linear and nnx.LinearGeneral that quantizes its input."""

  def dot(x, w, dims, **settings):
    (contract, w_contract), (batch, w_batch) = dims
    canonical = rows(x, contract, batch)
    if original in (None, jax.lax.dot_general) and _sums_inputs(weight, w_contract, w_batch):
      y = product(quantizers, canonical, w, weight, variable)
      if y is not None:
        return qarray.cast(y, settings.get('preferred_element_type', x.dtype))
    x_hat = unrows(quantizers.place(canonical, quantizers.input), x.shape, contract, batch)
    return (original or jax.lax.dot_general)(x_hat, w, dims, **settings)

  return dot


def einsum(original, quantizers, weight, variable):
  """An `einsum_op` for nnx.Einsum that quantizes its input."""

  def op(equation, x, w, **settings):
    (a, b), c = layouts.split_einsum(equation, w.shape, x.ndim)
    # The weight's matrix has its own order of the letters that both have: follow it.
    w_contract, w_batch = ([i for i, letter in enumerate(b) if letter in a and (letter in c) == kept]
                           for kept in (False, True))
    contract, batch = (tuple(a.index(b[i]) for i in axes) for axes in (w_contract, w_batch))
    canonical = rows(x, contract, batch)
    free = [letter for letter in a if letter not in b]
    outputs = [letter for letter in b if letter not in a]
    plain = len(set(a)) == len(a) and len(set(b)) == len(b) and set(free + outputs) <= set(c)
    if original is jnp.einsum and plain and _sums_inputs(weight, w_contract, w_batch):
      y = product(quantizers, canonical, w, weight, variable)
      if y is not None:
        letters = [b[i] for i in w_batch] + free + outputs
        y = jnp.transpose(y, [letters.index(letter) for letter in c])
        return qarray.cast(y, settings.get('preferred_element_type', x.dtype))
    x_hat = unrows(quantizers.place(canonical, quantizers.input), x.shape, contract, batch)
    return original(equation, x_hat, w, **settings)

  return op


def _sums_inputs(weight, contract, batch):
  """Whether a product sums over the axes that `weight` was quantized along: a shared one may not."""
  return weight is not None and (tuple(contract), tuple(batch)) == (weight.layout.inputs, weight.layout.batch)
