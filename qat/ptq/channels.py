"""Channels: a layer's weight seen by its input channels, or by its output channels, and changed along them.

Equivalences move scales, shifts and rotations from what a layer returns into what the next one reads. Here each
layer, norm and embedding says which of its numbers belong to which channel. Functions change a module in place: the
callers clone.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from qat.nn import layouts, quantized

# Norms whose last step is a gain, and an offset where there is one, for each channel of the last axis.
NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm)
CONVS = (nnx.Conv, nnx.ConvTranspose)


def map_inputs(module, f, path):
  """Replaces the weight m: f32[*lead, channels, rest] of what reads these channels by f(m), in place."""
  _map(module, input_view(module, path), f)


def map_outputs(module, f, path):
  """Replaces what makes these channels, m: f32[*lead, rest, channels], by f(m), in place.

  That is the weight, or a norm's gain, and the bias [*lead, 1, channels] if there is one.
  """
  if isinstance(module, NORMS):
    variables = [_gain(module, path)]
  else:
    _map(module, output_view(module, path), f)
    variables = []
  bias = vars(module).get('bias')
  lead = shape(module, path)[:-1]
  for v in variables + [bias] * (bias is not None):
    a = v.get_value()
    if a.size != math.prod(shape(module, path)):
      raise ValueError(f"'{path}' has a bias of shape {a.shape} for {shape(module, path)[-1]} output channels: it is "
                       'shared among them, and cannot be changed for each. Leave this layer out.')
    v.set_value(f(a.astype(jnp.float32).reshape(*lead, 1, -1)).reshape(a.shape).astype(a.dtype))


def add_to_bias(module, b, path):
  """Adds b: f32[*lead, channels] to what the module returns, in place; a layer without a bias gets one."""
  bias = vars(module).get('bias')
  if bias is not None:
    bias.set_value((bias.get_value().astype(jnp.float32) + b.reshape(bias.shape)).astype(bias.dtype))
    return
  if not isinstance(module, (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose)):
    raise ValueError(f"'{path}', a {type(module).__name__}, has no bias to hold an offset of {b.shape[-1]} channels. "
                     'Build it with one, or move no offset into it.')
  features = module.out_features if isinstance(module, nnx.LinearGeneral) else (b.shape[-1],)
  dtype = getattr(_value(module), 'dtype', jnp.float32)                  # Codes have none.
  module.bias = nnx.Param(b.reshape(*b.shape[:-1], *features).astype(dtype))
  module.use_bias = True


def shape(module, path):
  """(*lead, channels) of what a module returns."""
  if isinstance(module, NORMS):
    return tuple(_gain(module, path).shape)
  out = jax.eval_shape(output_view(module, path), _value(module))
  return (*out.shape[:-2], out.shape[-1])


def input_rows(module, path):
  """How many input channels a layer has."""
  return jax.eval_shape(input_view(module, path), _value(module)).shape[-2]


def inputs(module, path):
  """The weight of a layer by its input channels: f32[*lead, channels, rest]."""
  return input_view(module, path)(_value(module).astype(jnp.float32))


def outputs(module, path):
  """The weight of a layer by its output channels: f32[*lead, rest, channels]."""
  return output_view(module, path)(_value(module).astype(jnp.float32))


def find(model, path):
  """The module at `path`; an error names those there are."""
  modules = dict(quantized.walk(model))
  if path not in modules:
    raise ValueError(f"There is no module '{path}'. Those that have weights are "
                     f'{[p for p, m in modules.items() if layouts.layer_type(m) or isinstance(m, NORMS)]}.')
  return modules[path]


def refuse_quantized(model, what):
  """Raises if layers are quantized already."""
  if quantized.layers(model):
    raise ValueError(f'{what} was given a model whose layers {list(quantized.layers(model))} are quantized: it changes '
                     f'the weights that were put on a grid. {what} the float model first, then quantize.')


def input_view(module, path):
  """A permutation of a layer's weight: [*lead, *shape] -> [*lead, channels, rest]."""
  kind, layout = _kind(module, path)
  if kind is nnx.Embed:                                                  # As a tied head reads it.
    return lambda w: jnp.swapaxes(w, -1, -2)
  if kind in CONVS:
    axis = layout.inputs[-1] - len(layout.shape)
    groups = getattr(module, 'feature_group_count', 1)
    return lambda w: _by_group(w, axis, groups, len(layout.shape))
  batch = len(layout.batch)

  def view(w):
    m = layout.to_matrix(w)                                              # [*lead, *batch, in, out]
    lead = m.ndim - 2 - batch
    m = jnp.moveaxis(m, -2, lead)                                        # [*lead, in, *batch, out]
    return m.reshape(*m.shape[:lead + 1], -1)
  return view


def output_view(module, path):
  """A permutation of a layer's weight: [*lead, *shape] -> [*lead, rest, channels]."""
  kind, layout = _kind(module, path)
  if kind is nnx.Embed:
    return lambda w: w
  if layout.batch:
    raise ValueError(f"'{path}', a {type(module).__name__}, holds a batch of matrices: each has outputs of its own. "
                     'Only a layer of one matrix can hand on a change of its outputs.')
  return layout.to_matrix


def _by_group(w, axis, groups, rank):
  """The inputs of a convolution of groups: [*lead, *size, in / groups, out] -> [*lead, in, rest]."""
  lead = w.shape[:w.ndim - rank]
  w = jnp.moveaxis(w, axis, len(lead))                                   # [*lead, in / groups, *size, out]
  w = w.reshape(*w.shape[:-1], groups, -1)                               # [*lead, in / groups, *size, groups, rest]
  w = jnp.moveaxis(w, -2, len(lead))                                     # [*lead, groups, in / groups, *size, rest]
  return w.reshape(*lead, groups * w.shape[len(lead) + 1], -1)


def _map(module, view, f):
  variable, w = _variable(module), _value(module)
  before = jax.ShapeDtypeStruct(w.shape, jnp.float32)
  back, = jax.linear_transpose(view, before)(f(view(w.astype(jnp.float32))))  # Of a permutation: its inverse.
  variable.set_value(back.astype(w.dtype))


def _kind(module, path):
  kind = layouts.layer_type(module)
  if kind is None:
    raise ValueError(f"'{path}' is a {type(module).__name__}, which has no weight that is known here. Name one of "
                     f'{[t.__name__ for t in layouts.LAYERS]}.')
  return kind, layouts.LAYERS[kind][1](module)


def _variable(module):
  return vars(module)[layouts.LAYERS[layouts.layer_type(module)][0]]


def _value(module):
  return _variable(module).get_value()


def _gain(norm, path):
  """The gain of a norm."""
  if norm.scale is None:
    raise ValueError(f"'{path}', a {type(norm).__name__}, has no gain to hold a scale: it was built with "
                     'use_scale=False. Build it with a gain.')
  return norm.scale
