"""Adapted layers: any NNX module, with adapters beside its weights.

`adapted_type(Linear)` is a subclass of Linear, as `quantized_type(Linear)` is, of which it may be a subclass too: so
a layer keeps its code, its attributes and its paths. Its adapters' variables are under `adapters/<weight>/<name>/`.

Where a layer runs Flax's own forward, its product is x W + s (x A) B, and no matrix of W's size is made of A and B. Any
other reading of the weight (a bare Param, a convolution, a tied embedding multiplied by hand, a subclass's own forward)
gives W + s A B.

Frozen weights are decoded again in the backward pass (recompute.py), so that codes are all that is kept of them between
the passes. That holds for frozen layers without adapters as well: they get the same class.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.nn import adapters as adapters_, dot, layouts, quantized, recompute, rules, weights

# Layers whose product is an attribute that they call.
PRODUCTS = {nnx.Linear: 'dot_general', nnx.LinearGeneral: 'dot_general', nnx.Einsum: 'einsum_op'}


@functools.cache
def adapted_type(cls):
  """The subclass of a module class, quantized or not, whose instances have adapters."""
  flax, by_product = layer_class(cls), has_own_product(cls)

  class Layer(cls):

    def __getattribute__(self, name):
      value = super().__getattribute__(name)
      if name.startswith('_'):
        return value
      held = vars(self).get('adapters')
      return value if held is None or name not in vars(held) else _see(self, name, value)

    def __call__(self, *args, **kwargs):
      if flax in PRODUCTS and by_product:
        return _call(self, flax, args, kwargs)
      if flax is nnx.Embed and by_product:
        return _look_up(self, *args, **kwargs)
      return super().__call__(*args, **kwargs)

  if flax is nnx.Embed and by_product:
    Layer.attend = _attend
  quantized.hide(Layer, cls, 'adapters')
  Layer.__name__ = Layer.__qualname__ = f'Adapted{cls.__name__}'
  Layer.base_class = cls
  return Layer


def layer_class(cls):
  """Flax's class of a layer with a weight, or None."""
  return next((t for t in layouts.LAYERS if issubclass(cls, t)), None)


def has_own_product(cls):
  """Whether a class runs Flax's own forward, in which the product with its weight is known."""
  flax, floats = layer_class(cls), getattr(cls, 'float_class', cls)
  if flax is nnx.Embed:
    return floats.__call__ is flax.__call__ and floats.attend is flax.attend
  return flax in PRODUCTS and floats.__call__ is flax.__call__


def of(module, name):
  """The adapters of the weight `name` of a module: an nnx.Dict, name -> Adapter; or None."""
  held = vars(module).get('adapters') if hasattr(type(module), 'base_class') else None
  return None if held is None else vars(held).get(name)


def attach(module, name, path):
  """Makes `module`, in place, an instance of its adapted type; returns the adapters of its weight `name`."""
  if not hasattr(type(module), 'base_class'):
    if hasattr(module, 'adapters'):
      raise ValueError(f"'{path}', a {type(module).__name__}, has an attribute 'adapters' of its own, where its "
                       'adapters would go. Rename it, or leave its path out of the rules.')
    module.__class__ = adapted_type(type(module))
    module.adapters = nnx.Dict()
  if of(module, name) is None:
    vars(module)['adapters'][name] = nnx.Dict()
  return of(module, name)


def detach(module):
  """Takes the adapters off a module, in place."""
  del module.adapters
  module.__class__ = type(module).base_class


def active(layer, name):
  """The Adapters that a layer uses for its weight `name`, in the order of their names."""
  return [a for _, a in sorted(of(layer, name).items()) if a.active]


def base(layer):
  """The layer without its adapters: another view of the same variables."""
  return _view(type(layer).base_class, layer)


def _view(cls, layer, **changed):
  """An instance of `cls` with the attributes of `layer`, some changed, made without its constructor."""
  view = object.__new__(cls)
  vars(view).update({k: v for k, v in vars(layer).items() if k != 'adapters'} | changed)
  return view


def matrix(plain, name):
  """The weight of a layer without adapters: float[*lead, in, out]."""
  return layout(plain, name).to_matrix(getattr(plain, name)[...])


def layout(layer, name):
  return rules.Site('', layer, name, '').layout


def _see(layer, name, value):
  """The weight as the model reads it by hand."""
  used = active(layer, name)
  if not used:
    return value
  form = layout(layer, name)
  w = adapters_.merged(form.to_matrix(value[...]), used)
  return weights.Seen(form.from_matrix(w).astype(value.dtype), vars(layer)[name])


def _call(layer, flax, args, kwargs):
  """Flax's forward, with adapters in its product."""
  plain, product = base(layer), PRODUCTS[flax]
  changed = {product: _dot(layer, plain) if product == 'dot_general' else _einsum(layer, plain)}
  if flax is nnx.LinearGeneral:
    changed['dot_general_cls'] = None
  forward = _view(flax, layer, kernel=plain.kernel, **changed)
  q = quantized.of(layer)
  return forward(*args, **kwargs) if q is None else quantized.call(q, forward.__call__, args, kwargs, False)


def _multiply(layer, plain, name, product, x):
  """product(x, plain): of codes, which are all that is kept of them for the backward pass."""
  q, variable = quantized.of(layer), vars(layer)[name]
  # An input's variables (a calibrated range, what watches it) would be closed over: such layers keep their floats.
  has_state = q is not None and q.input is not None and bool(jax.tree.leaves(nnx.state(q.input)))
  if has_state or not isinstance(variable, weights.Codes) or not isinstance(variable.get_value(), qarray.QArray):
    return product(x, plain)
  return recompute.product(lambda x, codes: product(x, _with(plain, name, codes)), x, variable.get_value())


def _with(plain, name, codes):
  return _view(type(plain), plain, **{name: weights.Codes(codes)})


def _gain(layer, name, used, x):
  """What DoRA multiplies the outputs by once `x` is there, f32[*lead, out], or None."""
  if all(adapter.magnitude is None for adapter in used):
    return None
  plain, variable = base(layer), vars(layer)[name]
  if isinstance(variable, weights.Codes) and isinstance(variable.get_value(), qarray.QArray):
    plain = _with(plain, name, recompute.after(variable.get_value(), x))
  return adapters_.gain(matrix(plain, name), used)


def _dot(layer, plain):
  """A `dot_general` for nnx.Linear and nnx.LinearGeneral."""

  def dot_general(x, w, dims, **settings):
    y = _multiply(layer, plain, 'kernel', lambda x, plain: _original(plain)(
        x, plain.kernel[...].astype(w.dtype), dims, **settings), x)
    used = active(layer, 'kernel')
    if not used:
      return y
    (contract, _), (batch, _) = dims
    rows = dot.rows(x, contract, batch)                                  # [*batch, *free, in]
    added = _added(used, rows).reshape(y.shape).astype(y.dtype)
    g = _gain(layer, 'kernel', used, x)
    if g is None:
      return y + added
    free = rows.ndim - 1 - len(batch)
    outputs = layout(layer, 'kernel').outputs
    shape = (*g.shape[:-1], *(1,) * free, *y.shape[y.ndim - len(outputs):])
    return (y + added) * g.reshape(shape).astype(y.dtype)

  return dot_general


def _original(plain):
  """The `dot_general` that a layer has without adapters."""
  made = getattr(plain, 'dot_general_cls', None)
  return (made() if made is not None else plain.dot_general) or jax.lax.dot_general


def _added(used, rows):
  """The sum of s (x A) B."""
  return functools.reduce(jnp.add, [adapter(rows) for adapter in used])


def _einsum(layer, plain):
  """An `einsum_op` for nnx.Einsum."""
  form = layout(layer, 'kernel')

  def einsum_op(equation, x, w, **settings):
    product = lambda x, plain: plain.einsum_op(equation, x, plain.kernel[...].astype(w.dtype), **settings)
    used = active(layer, 'kernel')
    (a, b), c = layouts.split_einsum(equation, w.shape, x.ndim)
    is_own = _roles(a, b, c) == (form.inputs, form.outputs, form.batch) and {b[i] for i in form.outputs} <= set(c)
    if used and not is_own:
      return plain.einsum_op(equation, x, _by_hand(layer, used, equation).astype(w.dtype), **settings)
    y = _multiply(layer, plain, 'kernel', product, x)
    if not used:
      return y
    letters = lambda axes: ''.join(b[i] for i in axes)
    contract, batch = (tuple(a.index(b[i]) for i in axes) for axes in (form.inputs, form.batch))
    free = ''.join(letter for letter in a if letter not in b)
    added = _added(used, dot.rows(x, contract, batch))                   # [*batch, *free, out]
    added = added.reshape(*added.shape[:-1], *(w.shape[i] for i in form.outputs))
    y = y + jnp.einsum(f'{letters(form.batch)}{free}{letters(form.outputs)}->{c}', added).astype(y.dtype)
    g = _gain(layer, 'kernel', used, x)
    if g is None:
      return y
    g = g.reshape([w.shape[i] for i in form.batch + form.outputs]).astype(y.dtype)
    return jnp.einsum(f'{c},{letters(form.batch + form.outputs)}->{c}', y, g)

  return einsum_op


def _roles(a, b, c):
  """The axes of the kernel `b` that are inputs, outputs and batch: the rule of layouts.einsum."""
  axes = lambda keep: tuple(i for i, letter in enumerate(b) if keep(letter))
  return (axes(lambda l: l in a and l not in c), axes(lambda l: l not in a), axes(lambda l: l in a and l in c))


def _by_hand(layer, used, equation):
  """W + s A B for an equation that sums other axes than those of A."""
  if any(a.dropout is not None and not a.dropout.deterministic for a in used):
    raise ValueError(f"The equation '{equation}' sums other axes than the layer's own, '{layer.einsum_str}': there is "
                     'no input of A to drop. Call model.eval(), or give the adapter a dropout of 0.')
  return layer.kernel[...]


def _look_up(layer, tokens, **settings):
  """nnx.Embed's forward: the columns of (A B)^T of the tokens. Tokens have no dropout."""
  y = base(layer)(tokens, **settings)
  used = active(layer, 'embedding')
  for adapter in used:
    A, B = adapter.matrices                                              # [features, r], [r, words]
    rows = jnp.take(B.T, tokens, axis=0).astype(y.dtype)                 # [..., r]
    y = y + rows @ A.T.astype(y.dtype)
  g = _gain(layer, 'embedding', used, y)
  return y if g is None else y * jnp.take(g, tokens, axis=0)[..., None].astype(y.dtype)


def _attend(layer, query, **settings):
  """nnx.Embed.attend: the embedding as a head."""
  y = _multiply(layer, base(layer), 'embedding', lambda query, plain: plain.attend(query, **settings), query)
  used = active(layer, 'embedding')
  if not used:
    return y
  y = y + _added(used, query.astype(y.dtype))
  g = _gain(layer, 'embedding', used, query)
  return y if g is None else y * g.reshape((1,) * (y.ndim - 1) + g.shape).astype(y.dtype)
