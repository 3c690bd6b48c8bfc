"""calibrate: ranges for the activations, from batches."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.core import observers, qarray
from qat.nn import layouts, quantized, rules, transform


class Observation(nnx.Variable):
  """The running state of an Observer, [*lead] on every leaf."""


class Watch(nnx.Module):
  """Stands in a quantizer's place while batches pass: it looks, and lets the floats through."""

  def __init__(self, observer, block, channels, lead):
    self.observer, self.block = observer, block
    state = observer.init((1, channels), block)
    self.observation = Observation(jax.tree.map(lambda a: jnp.broadcast_to(a, lead + a.shape), state))

  def __call__(self, x):
    rows = x.reshape(-1, x.shape[-1])
    self.observation.set_value(self.observer.update(self.observation.get_value(), rows, self.block))
    return x

  def advance(self):
    """Draws nothing at random."""

  def saw_any(self):
    return np.isfinite(observers.lowest(self.observation.get_value()))


def calibrate(model, batches, apply=None):
  """A copy of `model` whose activation quantizers have their ranges.

  Weights are on their grids, activations in floats, and the model in evaluation mode (`model.eval()`)
  while the batches pass; nothing else of the model changes. Quantizers that have a range keep it.

  Args:
    model: what `quantize` returned.
    batches: an iterable of what `apply` takes.
    apply: (model, batch) -> anything; `model(batch)` if not given.

  Returns:
    A model of the same class, whose quantizers have their ranges.
  """
  if isinstance(batches, (jax.Array, np.ndarray)):
    raise TypeError(f'calibrate was given one array of shape {batches.shape}: it takes an iterable of batches. '
                    'Write [x], or list(x) if its first axis counts batches.')
  model = nnx.clone(model)
  waiting = _waiting(model)
  if not waiting:
    return model
  watched = nnx.clone(model)
  for path, holder, slot in _waiting(watched):
    layer = quantized.layers(watched)[path]
    setattr(holder, slot, _watch(getattr(holder, slot), layer, slot))
  watched.eval()
  _pass_batches(watched, batches, apply or (lambda m, batch: m(batch)))
  for path, holder, slot in waiting:
    watch = getattr(_same_place(watched, model, path, holder), slot)
    if slot == 'input' and not watch.saw_any() and isinstance(quantized.layers(model)[path], nnx.Embed):
      holder.input = None  # It was looked up, and is no head.
    else:
      setattr(holder, slot, _fitted(getattr(holder, slot), watch, f'{path}.{slot}'))
  return model


def _waiting(model):
  """(path, holder, attribute) of each activation quantizer that needs a range and has none."""
  return [(path, holder, slot) for path, layer in quantized.layers(model).items()
          for holder, slot in transform.activations(vars(layer)['quantizers'])
          if getattr(holder, slot).observer is not None]


def _same_place(watched, model, path, holder):
  """The module of `watched` that stands where `holder` stands in `model`."""
  here = vars(quantized.layers(model)[path])['quantizers']
  there = vars(quantized.layers(watched)[path])['quantizers']
  return there if holder is here else there.scores


def _pass_batches(watched, batches, apply):
  @nnx.jit
  def step(model, batch):
    apply(model, batch)

  count = 0
  for batch in batches:
    step(watched, batch)
    count += 1
  if not count:
    raise ValueError('calibrate was given no batch: ranges come from the numbers in them. '
                     'Give an iterable with at least one; a generator is used up after one pass.')


def _watch(quantizer, layer, slot):
  """A Watch for one activation of `layer`."""
  block = quantizer.spec.block
  if block not in ((...,), (..., 1)):
    raise ValueError(f'{type(quantizer).__name__}({quantizer.spec}) is calibrated: a range that is fixed before the '
                     'numbers are known has the block (...,), or (..., 1) for one a channel. '
                     'Use one of these, or STE, which fits each array anew.')
  channels = _channels(layer, slot) if block == (..., 1) else 1
  return Watch(quantizer.observer, block, channels, vars(layer)['quantizers'].lead)


def _channels(layer, slot):
  """The length of the last axis of a layer's input, as a product reads it, or of its output."""
  kind = layouts.layer_type(layer)
  if kind is None or slot not in ('input', 'output'):
    raise ValueError(f"'{slot}' of {type(layer).__name__} was given one range a channel: that is for the inputs and "
                     'outputs of layers with a weight. Use the block (...,).')
  if kind is nnx.Embed:
    return layer.features
  layout = rules.Site('', layer, layouts.LAYERS[kind][0], '').layout
  if slot == 'output':
    return layout.shape[layout.outputs[-1]]
  if kind is nnx.Conv:
    return layer.in_features
  if kind is nnx.ConvTranspose:
    return layout.shape[layout.inputs[-1]]
  return math.prod(layout.shape[a] for a in layout.inputs)


def _fitted(quantizer, watch, place):
  """`quantizer`, with the range that `watch` saw."""
  state = watch.observation.get_value()
  low = np.asarray(observers.lowest(state))
  if not watch.saw_any():
    raise ValueError(f"'{place}' was not reached by any calibration batch, or saw numbers that are not finite "
                     f'(least seen: {low}). Check the batches, or leave the layer in floats by a rule.')
  unsigned = getattr(quantizer, 'unsigned', None)
  if unsigned is not None and low >= 0:
    quantizer = quantizer.with_spec(unsigned)
  lead = jax.tree.leaves(state)[0].shape[:-2]
  fit = lambda s: tuple(qarray.decode(a) for a in watch.observer.fit(s, quantizer.spec))
  for _ in lead:
    fit = jax.vmap(fit)
  scale, zero = fit(state)
  thin = lambda a: None if a is None else a.reshape(*lead, a.shape[-1])     # [*lead, 1, c] -> [*lead, c]
  return quantizer.for_input(lead, thin(scale), thin(zero))
