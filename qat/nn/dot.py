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


@jax.custom_jvp
def integer_product(x_hat, w_hat, x, w):
  """The product of two integer QArrays, with the gradient of x_hat @ w_hat."""
  del x_hat, w_hat
  return integer.matmul(x, w)


@integer_product.defjvp
def _integer_product_jvp(primals, tangents):
  (x_hat, w_hat, x, w), (dx, dw, *_) = primals, tangents
  tangent = float_product(dx, w_hat) + float_product(x_hat, dw)
  return integer_product(x_hat, w_hat, x, w), tangent


def float_product(x, w):
  """[*batch, *rows, k], [*batch, k, n] -> f32[*batch, *rows, n]."""
  batch = tuple(range(w.ndim - 2))
  dims = (((x.ndim - 1,), (w.ndim - 2,)), (batch, batch))
  return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def product(quantizer, x, weight, variable):
  """x @ w for an input in the form of `rows` and a quantized weight.

  Args:
    quantizer: the input's.
    x: float[*batch, *rows, k].
    weight: the weights.Weight of the layer, and `variable` what it reads.

  Returns:
    [*batch, *rows, n] in the dtype of x, and exact sums of codes if the grids are integers; else None.
  """
  if not isinstance(quantizer, base.Quantizer):  # It only watches, for calibration.
    return None
  x_codes, w_codes = quantizer.encode(x), weight.encode(variable)
  if not (integer.fits(x_codes, -1) and integer.fits(w_codes, -2)):
    return None
  w_hat = weight.layout.to_matrix(weight.decode(variable))
  y = integer_product(quantizer(x), w_hat.astype(x.dtype), x_codes, w_codes)
  return qarray.cast(y, x.dtype)


def dot_general(original, quantizer, weight, variable):
  """A `dot_general` for nnx.Linear and nnx.LinearGeneral that quantizes its input."""

  def dot(x, w, dims, **settings):
    (contract, _), (batch, _) = dims
    canonical = rows(x, contract, batch)
    if original in (None, jax.lax.dot_general) and weight is not None:
      y = product(quantizer, canonical, weight, variable)
      if y is not None:
        outputs = tuple(weight.layout.shape[a] for a in weight.layout.outputs)
        return y.reshape(*y.shape[:-1], *outputs)
    x_hat = unrows(quantizer(canonical), x.shape, contract, batch)
    return (original or jax.lax.dot_general)(x_hat, w, dims, **settings)

  return dot


def einsum(original, quantizer, weight, variable):
  """An `einsum_op` for nnx.Einsum that quantizes its input."""

  def op(equation, x, w, **settings):
    (a, b), c = layouts.split_einsum(equation)
    contract = tuple(i for i, letter in enumerate(a) if letter in b and letter not in c)
    batch = tuple(i for i, letter in enumerate(a) if letter in b and letter in c)
    # The weight's matrix has its own order of these letters: follow it.
    contract, batch = (tuple(sorted(axes, key=lambda i: b.index(a[i]))) for axes in (contract, batch))
    canonical = rows(x, contract, batch)
    if original is jnp.einsum and weight is not None:
      y = product(quantizer, canonical, weight, variable)
      if y is not None:
        free = [letter for letter in a if letter not in b]
        letters = [a[i] for i in batch] + free + [letter for letter in b if letter not in a]
        y = y.reshape(*y.shape[:-1], *(w.shape[b.index(l)] for l in b if l not in a))
        return jnp.transpose(y, [letters.index(letter) for letter in c])
    return original(equation, unrows(quantizer(canonical), x.shape, contract, batch), w, **settings)

  return op


def unrows(x, shape, contract, batch):
  """The inverse of `rows`, for an array of `shape`."""
  contract, batch = (tuple(a % len(shape) for a in axes) for axes in (contract, batch))
  order = batch + tuple(a for a in range(len(shape)) if a not in contract + batch) + contract
  x = x.reshape([shape[a] for a in order])
  return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))
