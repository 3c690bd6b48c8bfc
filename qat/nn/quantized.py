"""Quantized layers: any NNX module, with quantizers where it reads its weights and its inputs.

`quantized_type(Linear)` is a subclass of Linear, so a layer keeps its code, its attributes and its
paths. It differs where an attribute is read: `self.kernel` gives the weight on its grid, and
`self.dot_general` a product that quantizes its input. NNX itself reads `vars(layer)`, so state,
gradients, optimizers and checkpoints see the float Param under its old path, and the quantizers'
variables under `quantizers/`. Nothing is patched: a class is made for each layer class, once.
"""

import functools

from flax import nnx
import jax.numpy as jnp

from qat.nn import dot, weights
from qat.quantizers import base, dorefa


class Quantizers(nnx.Module):
  """The quantizers of one layer.

  Attributes:
    path: the layer's path, for messages.
    weights: parameter name -> weights.Weight.
    input, output, gradient: a quantizer, or None for floats.
    scores: attention.Scores, or None.
  """

  def __init__(self, path):
    self.path = path
    self.weights = nnx.Dict()
    self.input, self.output, self.gradient, self.scores = (nnx.data(None) for _ in range(4))


def read(quantizers, attributes, name, value):
  """What a layer sees in place of its attribute `name`, whose float value is `value`."""
  if name in vars(quantizers.weights):
    return vars(quantizers.weights)[name].see(value)
  return READS[name](quantizers, attributes, value) if name in READS else value


def call(quantizers, forward, args, kwargs, input_at_call):
  """The layer's forward between its input and its output quantizers."""
  q = quantizers
  if q.input is not None and input_at_call and jnp.issubdtype(jnp.result_type(args[0]), jnp.floating):
    args = (q.input(args[0]), *args[1:])
  y = forward(*args, **kwargs)
  y = y if q.output is None else q.output(y)
  y = y if q.gradient is None else q.gradient(y)
  for quantizer in (*q.weights.values(), q.input, q.output, q.gradient):
    if isinstance(quantizer, (base.Quantizer, weights.Weight, dorefa.DoReFaGradient)):
      quantizer.advance()
  return y


def _product(make):
  def read_product(quantizers, attributes, value):
    weight = vars(quantizers.weights).get('kernel')
    if quantizers.input is None:
      return value
    return make(value, quantizers.input, weight, attributes['kernel'])
  return read_product


def _attention(quantizers, attributes, value):
  del attributes
  return value if quantizers.scores is None else quantizers.scores


# What stands for an attribute, given the layer's quantizers, its attributes, and the float value.
READS = {'dot_general': _product(dot.dot_general), 'einsum_op': _product(dot.einsum), 'attention_fn': _attention}
# Layers that quantize their input in the product; all others at the door.
PRODUCTS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


@functools.cache
def quantized_type(cls):
  """The subclass of a module class whose instances have quantizers. The classes share one layout."""

  class Layer(cls):

    def __getattribute__(self, name):
      value = super().__getattribute__(name)
      if name.startswith('_') or name not in vars(self):
        return value
      quantizers = vars(self).get('quantizers')
      return value if quantizers is None else read(quantizers, vars(self), name, value)

    def __call__(self, *args, **kwargs):
      return call(vars(self)['quantizers'], super().__call__, args, kwargs, not issubclass(cls, PRODUCTS))

  if issubclass(cls, nnx.Embed):  # Looked up by whole numbers; as a head it has an input.
    Layer.attend = lambda self, query: cls.attend(self, quantized_query(vars(self)['quantizers'], query))
  Layer.__name__ = Layer.__qualname__ = f'Quantized{cls.__name__}'
  Layer.float_class = cls
  return Layer


def quantized_query(quantizers, query):
  return query if quantizers.input is None else quantizers.input(query)


def is_quantized(module):
  return 'quantizers' in vars(module) and hasattr(type(module), 'float_class')


def attach(module, path):
  """Makes `module`, in place, an instance of its quantized type; returns its Quantizers."""
  if not is_quantized(module):
    module.__class__ = quantized_type(type(module))
    module.quantizers = Quantizers(path)
  return vars(module)['quantizers']


def layers(model):
  """path -> layer, for the quantized layers of `model`, in the order of `walk`."""
  return {path: m for path, m in walk(model) if is_quantized(m)}


def walk(module, path=(), seen=None):
  """Yields (path, module) for `module` and those below, each once, in the order they were set."""
  seen = set() if seen is None else seen
  if id(module) in seen:
    return
  seen.add(id(module))
  yield '/'.join(path), module
  for name, child in vars(module).items():
    if isinstance(child, nnx.Module) and name != 'quantizers':
      yield from walk(child, (*path, name), seen)
