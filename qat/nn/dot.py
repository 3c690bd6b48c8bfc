"""Products of a quantized input and a quantized weight.

Where both are integers and their scales do not change along the sum, the product is one of int8 codes
with int32 sums, in training as in serving: what is trained is, bit for bit, what is served. So are those of fp8,
MXFP8 and NVFP4, where the device multiplies them. The gradient is that of the product of the decoded operands. Other
grids, and layers that were quantized with compute='float', multiply decoded operands.

Frozen weights go to qat/kernels, which multiply by codes: those that `qat.prepare` put in a kernel's layout, and on GPU
and TPU all. On CPU those that were not prepared are decoded, as in training, and so give the same bits.
"""

import math

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.kernels import block_scaled, encode, float8, integer, matmul, matmul_xla, prepared
from qat.nn import layouts, weights
from qat.quantizers import base, ste

KINDS = (integer, float8, block_scaled)  # Products of codes.


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
def code_product(x_hat, w_hat, x, w):
  """The product of two QArrays that one of KINDS fits, with the gradient of x_hat @ w_hat."""
  del x_hat, w_hat
  return _kind(x, w, KINDS).matmul(x, w)


@code_product.__wrapped__.defjvp
def _code_product_jvp(primals, tangents):
  (x_hat, w_hat, x, w), (dx, dw, *_) = primals, tangents
  tangent = float_product(dx, w_hat) + float_product(x_hat, dw)
  return code_product(x_hat, w_hat, x, w), tangent


@jax.custom_vjp
def prepared_product(x_hat, x, w):
  """The product of a QArray and a Prepared, with the gradient of x_hat @ decode(w)."""
  del x_hat
  return matmul.matmul(x, w)


def _prepared_product_backward(kept, dy):
  x_hat, w = kept
  dx = matmul_xla.transposed(dy, matmul.decode(w, dy.dtype))
  return dx.astype(x_hat.dtype), None, None


prepared_product.defvjp(lambda x_hat, x, w: (prepared_product(x_hat, x, w), (x_hat, w)), _prepared_product_backward)


def float_product(x, w, precision=None):
  """[*batch, *rows, k], [*batch, k, n] -> f32[*batch, *rows, n]."""
  batch = tuple(range(w.ndim - 2))
  dims = (((x.ndim - 1,), (w.ndim - 2,)), (batch, batch))
  return jax.lax.dot_general(x, w, dims, precision, preferred_element_type=jnp.float32)


def product(quantizers, x, w, weight, variable):
  """x @ w for an input in the form of `rows` and a quantized weight, from its codes.

  Args:
    quantizers: the layer's.
    x: float[*batch, *rows, k].
    w: the weight as the layer read it, on its grid and in its own shape.
    weight: the weights.Weight of the layer, and `variable` what it reads.

  Returns:
    [*batch, *rows, *outputs], or None where decoded operands are multiplied.
  """
  if x.size == 0:
    return None
  if quantizers.input is None:
    y = _by_kernel(x, variable)
  elif isinstance(quantizers.input, base.Quantizer):  # Not what only watches, for calibration.
    y = _codes_by_codes(quantizers, x, w, weight, variable)
  else:
    y = None
  return None if y is None else _parted(y, weight)


def by_matrix(quantizers, x, w, weight, precision=None):
  """x @ w of decoded operands, with the arguments of `product` and the same result: by the matrix [in, out] of w.

  A Param that lies as [out, in] would be read so in training, and frozen as its codes lie, [in, out]: for few rows XLA
  then adds up in another order. The barrier is where XLA lays a matrix out row after row; a constraint of its layout
  would make each device of a mesh gather it whole.
  """
  x_hat = x if quantizers.input is None else quantizers.place(x, quantizers.input)
  matrix = jax.lax.optimization_barrier(weight.layout.to_matrix(w))
  return _parted(float_product(x_hat, matrix, precision), weight)


def _parted(y, weight):
  """[..., out] in the shape of the layer's outputs."""
  return y.reshape(*y.shape[:-1], *(weight.layout.shape[a] for a in weight.layout.outputs))


def _by_kernel(x, variable):
  """A float input by frozen codes: [*batch, *rows, out], or None where they are decoded."""
  if not isinstance(variable, weights.Codes) or isinstance(variable, weights.Decoded):
    return None
  w = variable.get_value()
  if isinstance(w, prepared.Prepared) or jax.default_backend() != 'cpu':
    return matmul.matmul(x, w)
  return None


def _codes_by_codes(quantizers, x, w, weight, variable):
  """Sums of codes: f32[*batch, *rows, out], or None where these are no units of a device's product."""
  if isinstance(variable, weights.Decoded):
    return None
  w_codes = weight.encode(variable)
  if isinstance(w_codes, prepared.Prepared):
    x_hat = quantizers.place(x, quantizers.input)
    x_codes = _encoded(quantizers.input, jax.lax.stop_gradient(x))
    takes = matmul.explain(x_codes, w_codes)[w_codes.target] is None
    return prepared_product(x_hat, x_codes, w_codes) if takes else matmul.matmul(x_hat, w_codes)
  x_hat, x_codes = quantizers.place(x, quantizers.input.both)
  if quantizers.compute == 'float' or _kind(x_codes, w_codes, _kinds()) is None:
    return None
  return code_product(x_hat, weight.layout.to_matrix(w), x_codes, w_codes)


def _encoded(quantizer, x):
  """quantizer.encode(x), in one pass over memory where the device has a kernel for it."""
  if isinstance(quantizer, ste.STE) and quantizer.rule is qarray.absmax:
    return encode.encode(x, quantizer.spec)
  return quantizer.encode(x)


def dot_general(original, quantizers, weight, variable):
  """A `dot_general` for nnx.Linear and nnx.LinearGeneral that quantizes its input, if it has a quantizer."""

  def dot(x, w, dims, **settings):
    (contract, w_contract), (batch, w_batch) = dims
    canonical = rows(x, contract, batch)
    if original in (None, jax.lax.dot_general) and _sums_inputs(weight, w_contract, w_batch):
      y = product(quantizers, canonical, w, weight, variable)
      if y is not None:
        return qarray.cast(y, settings.get('preferred_element_type', x.dtype))
    x_hat = _placed(quantizers, canonical, x, contract, batch)
    return (original or jax.lax.dot_general)(x_hat, w, dims, **settings)

  return dot


def einsum(original, quantizers, weight, variable):
  """An `einsum_op` for nnx.Einsum that quantizes its input, if it has a quantizer."""

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
      y = by_matrix(quantizers, canonical, w, weight, settings.get('precision')) if y is None else y
      letters = [b[i] for i in w_batch] + free + outputs
      y = jnp.transpose(y, [letters.index(letter) for letter in c])
      return qarray.cast(y, settings.get('preferred_element_type', x.dtype))
    x_hat = _placed(quantizers, canonical, x, contract, batch)
    return original(equation, x_hat, w, **settings)

  return op


def _kinds():
  """The products of codes that this process' device has. CPUs have none of fp8, and would cast each operand."""
  if jax.default_backend() == 'cpu':
    return KINDS[:1]
  return KINDS if block_scaled.available() else KINDS[:2]


def _kind(x, w, kinds):
  """That of `kinds` which multiplies these codes, or None."""
  return next((kind for kind in kinds if kind.fit(x, w)), None)


def _placed(quantizers, canonical, x, contract, batch):
  """The input on its grid, in its own shape."""
  if quantizers.input is None:
    return x
  return unrows(quantizers.place(canonical, quantizers.input), x.shape, contract, batch)


def _sums_inputs(weight, contract, batch):
  """Whether a product sums over the axes that `weight` was quantized along: a shared one may not."""
  return weight is not None and (tuple(contract), tuple(batch)) == (weight.layout.inputs, weight.layout.batch)
