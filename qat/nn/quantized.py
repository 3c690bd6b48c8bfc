"""Quantized layers: any NNX module, with quantizers where it reads its weights and its inputs.

`quantized_type(Linear)` is a subclass of Linear, so a layer keeps its code, its attributes and its
paths. It differs where an attribute is read: `self.kernel` gives the weight on its grid, and
`self.dot_general` a product that quantizes its input. NNX itself reads `vars(layer)`, so state,
gradients, optimizers and checkpoints see the float Param under its old path, and the quantizers'
variables under `quantizers/`. Nothing is patched: a class is made for each layer class, once.
"""

import functools
import inspect

from flax import nnx
import jax.numpy as jnp

from qat.core import qarray
from qat.nn import dot, weights


# By their codes, where the device has a product of them; or decoded, in floats: the same but for rounding of sums.
COMPUTE = ('low_bit', 'float')


class Label(str):
  """A name for messages. All are equal, so that two layers of one structure share their compiled programs."""

  def __eq__(self, other):
    return isinstance(other, Label)

  def __hash__(self):
    return hash(Label)


class Quantizers(nnx.Module):
  """The quantizers of one layer.

  Attributes:
    path: the layer's path, for messages.
    lead: the axes on which nnx.vmap or nnx.scan stacked the layer.
    weights: parameter name -> weights.Weight.
    input, output, gradient: a quantizer, or None for floats.
    scores: attention.Scores, or None.
    compute: of COMPUTE: how an input and a weight that are both on a grid are multiplied.
  """

  def __init__(self, path, lead):
    self.path, self.lead, self.compute = Label(path), lead, COMPUTE[0]
    self.weights = nnx.Dict()
    self.input, self.output, self.gradient, self.scores = (nnx.data(None) for _ in range(4))

  def place(self, x, quantizer):
    """quantizer(x) for the layer's input or output; errors name the layer."""
    if x.size == 0:  # No number has no range, and is on every grid.
      return x
    try:
      return quantizer(x)
    except ValueError as e:
      raise ValueError(f"Layer '{self.path}', called on an input of shape {x.shape}: {e}") from e

  def see(self, name, variable):
    """The weight `name` on its grid."""
    try:
      return vars(self.weights)[name].see(variable)
    except ValueError as e:
      raise ValueError(f"'{name}' of layer '{self.path}': {e}") from e

  def advance(self):
    """Goes on to the next random draws."""
    for q in (*self.weights.values(), self.input, self.output, self.gradient, self.scores):
      if q is not None:
        q.advance()


def call(quantizers, forward, args, kwargs, input_at_call):
  """The layer's forward between its input and its output quantizers."""
  q = quantizers
  if q.input is not None and input_at_call:
    bound = inspect.signature(forward).bind(*args, **kwargs)
    name, x = next(iter(bound.arguments.items()))
    bound.arguments[name] = q.place(_as_float(x), q.input)
    args, kwargs = bound.args, bound.kwargs
  y = forward(*args, **kwargs)
  y = y if q.output is None else q.place(y, q.output)
  y = y if q.gradient is None else q.gradient(y)
  q.advance()
  return y


def _as_float(x):
  """Whole numbers, such as pixels, as the floats that a layer makes of them."""
  return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def attend(layer, float_attend, query, *args, **kwargs):
  """nnx.Embed.attend, for a tied head: its query is an input."""
  q, variable = vars(layer)['quantizers'], vars(layer)['embedding']
  weight = vars(q.weights).get('embedding')
  if weight is None or float_attend is not nnx.Embed.attend or args or kwargs:
    return float_attend(layer, query if q.input is None else q.place(query, q.input), *args, **kwargs)
  query, w = layer.promote_dtype((query, layer.embedding[...]), dtype=layer.dtype)
  y = dot.product(q, query, w, weight, variable)
  return qarray.cast(dot.by_matrix(q, query, w, weight) if y is None else y, query.dtype)


def _product(make):
  def read(quantizers, attributes, value):
    weight = vars(quantizers.weights).get('kernel')
    if quantizers.input is None and weight is None:
      return value
    if attributes.get('dot_general_cls') is not None:
      value = attributes['dot_general_cls']()
    return make(value, quantizers, weight, attributes['kernel'])
  return read


def _no_class(quantizers, attributes, value):  # None, or the layer would not read its dot_general.
  return value if quantizers.input is None and not isinstance(attributes['kernel'], weights.Codes) else None


def _attention(quantizers, attributes, value):
  if quantizers.scores is None:
    return value
  # A function that changes the operands first keeps doing so, and the quantizers see what it made of them.
  return value.around(quantizers.scores) if hasattr(value, 'around') else quantizers.scores


# What stands for an attribute, given the layer's quantizers, its attributes, and the float value.
READS = {'dot_general': _product(dot.dot_general), 'dot_general_cls': _no_class, 'einsum_op': _product(dot.einsum),
         'attention_fn': _attention}
# Layers that quantize their input in the product; all others at the door.
PRODUCTS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


def _input_at_call(cls):
  """Whether a layer's input is quantized at the door: it is no lookup, and its product is out of reach."""
  if not issubclass(cls, PRODUCTS):
    return not issubclass(cls, nnx.Embed)
  # A subclass may have a forward of its own, which never reaches its layer's product.
  reached = set(inspect.unwrap(cls.__call__).__code__.co_names)
  return not reached & {'dot_general', 'einsum_op', '__call__'}


@functools.cache
def quantized_type(cls):
  """The subclass of a module class whose instances have quantizers. The classes share one layout."""
  input_at_call = _input_at_call(cls)

  class Layer(cls):

    def __getattribute__(self, name):
      value = super().__getattribute__(name)
      if name.startswith('_') or name not in vars(self):
        return value
      quantizers = vars(self).get('quantizers')
      if quantizers is None:
        return value
      if name in vars(quantizers.weights):
        return quantizers.see(name, value)
      return READS[name](quantizers, vars(self), value) if name in READS else value

    def __call__(self, *args, **kwargs):
      return call(vars(self)['quantizers'], super().__call__, args, kwargs, input_at_call)

  if issubclass(cls, nnx.Embed):
    Layer.attend = lambda self, *args, **kwargs: attend(self, cls.attend, *args, **kwargs)
  hide(Layer, cls, 'quantizers')
  Layer.__name__ = Layer.__qualname__ = f'Quantized{cls.__name__}'
  Layer.float_class = cls
  return Layer


def hide(layer, cls, name):
  """Keeps an attribute that a subclass of `cls` adds from being an item, where `cls` is a container of modules."""
  if issubclass(cls, nnx.Dict):  # Its keys are its attributes.
    layer.__iter__ = lambda self: (key for key in cls.__iter__(self) if key != name)
  if issubclass(cls, nnx.List):  # Its keys are whole numbers, which do not sort among names.
    layer._pytree__has_int_keys = False


def of(module):
  """The Quantizers of a module, or None."""
  q = vars(module).get('quantizers')
  return q if isinstance(q, Quantizers) else None


def attach(module, path, lead=()):
  """Makes `module`, in place, an instance of its quantized type; returns its Quantizers."""
  if of(module) is None:
    if hasattr(module, 'quantizers'):
      raise ValueError(f"'{path}', a {type(module).__name__}, has an attribute 'quantizers' of its own, where its "
                       'quantizers would go. Rename it, or leave its path in floats by a rule.')
    if hasattr(type(module), 'base_class'):
      raise ValueError(f"Layer '{path}' has adapters on its float weight. Call qat.quantize first, and qat.lora on "
                       'what it returns; or merge the adapters.')
    module.__class__ = quantized_type(type(module))
    module.quantizers = Quantizers(path, lead)
  return vars(module)['quantizers']


def layers(model):
  """path -> layer, for the quantized layers of `model`, in the order of `walk`."""
  return {path: m for path, m in walk(model) if of(m) is not None}


def walk(model):
  """(path, module) for `model` and those below, each once, in the order they were set.

  A module of several names has the path that NNX's state gives it, the first in NNX's order of attributes: a copy of
  a model sets them in that order, and so has the same paths.
  """
  found, stack, tied = {}, [((), model)], False                          # found: id -> (path, module).
  while stack:
    path, module = stack.pop()
    if id(module) in found:
      tied = True
      continue
    found[id(module)] = path, module
    below = [((*path, name), child) for name, child in children(module)
             if isinstance(child, nnx.Module) and not isinstance(child, Quantizers)]
    stack += reversed(below)
  if tied:
    found |= {id(m): (path, m) for path, m in nnx.iter_modules(model, graph=True) if id(m) in found}
  return [('/'.join(map(str, path)), module) for path, module in found.values()]


def children(module):
  """(name, value) for the attributes of a module, and for what lists, tuples and dicts among them hold."""

  def inside(name, value):
    if isinstance(value, dict):
      items = value.items()
    elif isinstance(value, (list, tuple)):
      items = enumerate(value)
    else:
      yield name, value
      return
    for key, item in items:
      yield from inside(f'{name}/{key}', item)

  for name, value in vars(module).items():
    yield from inside(name, value)
