"""A quantized weight: what a layer sees when it reads its Param.

A weight is a matrix [in, out], or many of them, [*lead, in, out]: the batch axes of a layer, and those on
which nnx.vmap or nnx.scan stacked layers. Quantizers see one matrix at a time, so that the codes are
the same whether a layer reads its own slice or `freeze` reads the stack.
"""

import functools

from flax import nnx
import jax

from qat.core import qarray
from qat.kernels import matmul, prepared


class Codes(nnx.Variable):
  """A frozen QArray[*lead, in, out], or a Prepared[in, out]. Not a Param: optimizers leave it alone."""


class Decoded(Codes):
  """The numbers of codes, in their layer's shape: what qat.prepare makes where there is no kernel for them."""


class Seen(nnx.Param):
  """The weight on its grid, made anew at each reading. Writing goes to the Param behind it."""

  __slots__ = ('_source',)

  def __init__(self, value, source):
    object.__setattr__(self, '_source', source)
    super().__init__(value)

  def set_value(self, value, **index):
    if isinstance(self._source, Codes):
      raise ValueError(f'A frozen weight of shape {self.shape} was written to: it holds codes, and no float. '
                       'Write to the model before qat.freeze.')
    self._source.set_value(value, **index)


class Weight(nnx.Module):
  """Reads one Param of a layer through a quantizer, or the Codes that took its place."""

  def __init__(self, quantizer, layout, dtype):
    self.quantizer, self.layout, self.dtype = quantizer, layout, dtype

  def encode(self, variable):
    """The codes: QArray[*lead, in, out]; of what was prepared, what is there."""
    if isinstance(variable, Codes):
      return variable.get_value()
    matrices = self.layout.to_matrix(jax.lax.stop_gradient(variable.get_value()))
    return _each(lambda quantizer, w: quantizer.encode(w), self.quantizer, matrices)

  def decode(self, variable):
    """The weight on its grid, in its layer's shape and its Param's dtype."""
    value = variable.get_value()
    if isinstance(variable, Decoded):
      return value
    if isinstance(variable, Codes):
      return self.layout.from_matrix(decode(value, self.dtype))
    matrices = self.layout.to_matrix(value)
    return self.layout.from_matrix(_each(lambda quantizer, w: quantizer(w), self.quantizer, matrices))

  def see(self, variable):
    return Seen(self.decode(variable), variable)

  def advance(self):
    if self.quantizer is not None:
      self.quantizer.advance()


def decode(q, dtype):
  """The numbers of Codes: QArray[*lead, in, out] -> dtype[*lead, in, out]."""
  if isinstance(q, prepared.Prepared):
    return matmul.decode(q, dtype)
  numbers = functools.partial(qarray.decode, dtype=dtype)
  for _ in range(q.ndim - 2):
    numbers = jax.vmap(numbers)
  return numbers(q)


def _each(f, quantizer, matrices):
  """f(quantizer, matrix) for each of [*lead, in, out]; the quantizer's variables are [*lead, ...]."""
  if matrices.ndim == 2:
    return f(quantizer, matrices)
  graph, state = nnx.split(quantizer)
  one = lambda state, matrix: f(nnx.merge(graph, state), matrix)
  for _ in range(matrices.ndim - 2):
    one = jax.vmap(one)
  return one(state, matrices)


def freeze(weight, variable):
  """The Codes that stand for `variable` from now on."""
  return Codes(_encode(weight, variable))


@nnx.jit
def _encode(weight, variable):
  return weight.encode(variable)


def any_codes(model):
  """Whether any weight of a model is frozen."""
  return bool(nnx.to_flat_state(nnx.state(model, Codes)).leaves)


def shapes(weight, variable):
  """The QArray that `freeze` would make, of shapes and dtypes only."""
  return nnx.eval_shape(lambda weight, variable: weight.encode(variable), weight, variable)
