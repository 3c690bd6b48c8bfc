"""Bias correction: take away the mean error that rounding the weights leaves in each layer's outputs.

Nagel et al. Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019, Sec. 4.2 and
Appendix D. https://arxiv.org/abs/1906.04721

E[y_hat] = E[y] + E[eps x] with eps = W_hat - W, which a bias can undo. E[x] comes from batches (`correct`,
Appendix D), or from BatchNorm's offset and gain (`relu_mean`, Sec. 4.2.1).

Differences from the paper: layers are corrected in the order in which the model defines them; a layer without a bias
gets one.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import quantized, rules
from qat.ptq import channels

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose)


def correction(w, w_hat, mean):
  """What to add to the bias: E[x] (W - W_hat).

  Args:
    w, w_hat: f32[i, o], before and after rounding.
    mean: f32[i], E[x].

  Returns:
    f32[o].
  """
  return jnp.matmul(mean, w - w_hat, precision='highest')


def relu_mean(beta, gamma):
  """E[relu(x)] of x from N(beta, gamma^2): beta Phi(beta / gamma) + gamma phi(beta / gamma).

  Args:
    beta, gamma: f32[c], the offset and gain of the BatchNorm before the relu.

  Returns:
    f32[c].
  """
  gamma = jnp.maximum(jnp.abs(gamma), jnp.finfo(jnp.float32).tiny)
  return beta * jax.scipy.stats.norm.cdf(beta / gamma) + gamma * jax.scipy.stats.norm.pdf(beta / gamma)


class Sum(nnx.Variable):
  """Sums of outputs, f32[*lead, channels], or their number, f32[*lead]."""


class Mean(nnx.Module):
  """Stands in an output quantizer's place: takes the mean of what comes to it, and hands it on."""

  def __init__(self, inner, shape):
    self.inner = nnx.data(inner)
    self.sum, self.count = Sum(jnp.zeros(shape)), Sum(jnp.zeros(shape[:-1]))

  def __call__(self, y):
    rows = y.astype(jnp.float32).reshape(-1, y.shape[-1])
    self.sum.set_value(self.sum.get_value() + jnp.sum(rows, 0))
    self.count.set_value(self.count.get_value() + jnp.float32(len(rows)))
    return y if self.inner is None else self.inner(y)

  def advance(self):
    if self.inner is not None:
      self.inner.advance()


def correct(model, floats, batches, apply=None):
  """A copy of a quantized model whose biases make up for the mean error of the rounded weights.

  Each layer is corrected on inputs that come through the corrected layers before it: there are as many passes over
  the batches as layers.

  Args:
    model: what `qat.quantize` returned, calibrated; frozen or not.
    floats: the float model that it came from.
    batches: a list of what `apply` takes.
    apply: (model, batch) -> anything; `model(batch)` if not given.

  Returns:
    A model of the same class, each of whose quantized layers has a bias.
  """
  batches, apply = list(batches), apply or (lambda model, batch: model(batch))
  if not batches:
    raise ValueError('bias_correction.correct was given no batch: it takes means over them. Give at least one.')
  model, floats = nnx.clone(model), nnx.clone(floats)
  paths = _corrected(model)
  for path in paths:                                                     # Now, so that one program serves all passes.
    layer = channels.find(floats, path)
    shape = channels.shape(layer, path)
    if vars(layer).get('bias') is None:
      channels.add_to_bias(channels.find(model, path), jnp.zeros(shape), path)
    for m in (model, floats):
      _watch(m, path, shape)
  step = nnx.jit(lambda model, batch: (apply(model, batch), None)[1])
  target = _means(floats, step, batches, paths)
  for path in paths:
    wrong = _means(model, step, batches, paths)[path] - target[path]
    channels.add_to_bias(channels.find(model, path), -wrong, path)
  for path in paths:
    q = quantized.of(channels.find(model, path))
    q.output = q.output.inner
  return model


def _corrected(model):
  """The paths of quantized layers whose outputs a bias can move."""
  paths = [path for path, layer in quantized.layers(model).items()
           if isinstance(layer, LAYERS) and quantized.of(layer).weights]
  if not paths:
    raise ValueError('bias_correction.correct was given a model without a quantized Linear or Conv: there is no '
                     'rounding to make up for. Call qat.quantize first.')
  return paths


def _watch(model, path, shape):
  """Puts a Mean at the output of a layer, in place."""
  site = next(s for s in rules.sites(model) if s.path == path and s.name is not None)
  q = quantized.attach(site.module, path, site.lead)
  q.output = Mean(q.output, shape)


def _means(model, step, batches, paths):
  """{path: f32[*lead, channels]}, the mean output of each layer, in evaluation mode."""
  working = nnx.clone(model)
  working.eval()
  for batch in batches:
    step(working, batch)
  found = {path: quantized.of(channels.find(working, path)).output for path in paths}
  if dead := [path for path, mean in found.items() if not np.all(mean.count.get_value())]:
    raise ValueError(f'No batch reached {dead}. Check the batches, or leave these layers in floats by a rule.')
  return {path: mean.sum.get_value() / mean.count.get_value()[..., None] for path, mean in found.items()}
