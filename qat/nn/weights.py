"""A quantized weight: what a layer sees when it reads its Param."""

from flax import nnx

from qat.core import qarray


class Codes(nnx.Variable):
  """A frozen QArray[*lead, in, out]. Not a Param: optimizers leave it alone."""


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

  def __init__(self, quantizer, layout):
    self.quantizer, self.layout = quantizer, layout

  def encode(self, variable):
    """The codes: QArray[*lead, in, out]."""
    if isinstance(variable, Codes):
      return variable.get_value()
    return self.quantizer.encode(self.layout.to_matrix(variable.get_value()))

  def decode(self, variable):
    """The weight on its grid, in its layer's shape."""
    if isinstance(variable, Codes):
      return self.layout.from_matrix(qarray.decode(variable.get_value()))
    return self.layout.from_matrix(self.quantizer(self.layout.to_matrix(variable.get_value())))

  def see(self, variable):
    return Seen(self.decode(variable), variable)

  def advance(self):
    if self.quantizer is not None:
      self.quantizer.advance()


def freeze(weight, variable):
  """The Codes that stand for `variable` from now on."""
  encode = nnx.jit(lambda quantizer, w: quantizer.encode(weight.layout.to_matrix(w)))
  return Codes(encode(weight.quantizer, variable.get_value()))


def shapes(weight, variable):
  """The QArray that `freeze` would make, of shapes and dtypes only; random streams do not move."""
  encode = lambda quantizer, w: quantizer.encode(weight.layout.to_matrix(w))
  return nnx.eval_shape(encode, nnx.clone(weight.quantizer), variable.get_value())
