"""BatchNorm and quantized weights: folding it into the layer before it, and estimating its statistics anew.

Folding: Jacob et al. 2018, Sec. 3.2, https://arxiv.org/abs/1712.05877. In evaluation mode BatchNorm is an
affine map of each channel, so the layer before it can do it: one grid then holds what is served.

Estimating anew: Nagel et al. Overcoming Oscillations in Quantization-Aware Training, ICML 2022, Sec. 4.1.
https://arxiv.org/abs/2203.11086. Running averages lag behind weights that jump between grid points.
"""

import collections

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import calls, quantized

# Layers whose outputs are the last axis of kernel, bias and result.
FOLDED = (nnx.Linear, nnx.Conv)
# How far outputs may move, as a share of the largest: sums in another order.
TOLERANCES = {jnp.dtype('float32'): 1e-4, jnp.dtype('bfloat16'): 0.1, jnp.dtype('float16'): 0.02}


class Identity(nnx.Module):
  """Stands where a BatchNorm was folded away."""

  def __call__(self, x, *args, **kwargs):
    return x


def fold_batch_norm(model, *args, **kwargs):
  """A copy of `model` in which each BatchNorm that normalizes a Linear or Conv is folded into it.

  Which normalizes which is seen by tracing the model in evaluation mode. A layer without a bias gets one.

  Args:
    model: a float model.
    *args, **kwargs: what it is called with, as arrays.

  Returns:
    A model with the same outputs in evaluation mode; Identity modules stand for the BatchNorms.
  """
  if quantized.layers(model):
    raise ValueError(f'fold_batch_norm was given a model whose layers {list(quantized.layers(model))} are quantized: '
                     'folding changes the weights that were put on a grid. Fold first, then quantize.')
  pairs = _pairs(model, args, kwargs)
  folded = nnx.clone(model)
  modules = dict(quantized.walk(folded))
  for layer, norm in pairs:
    _fold(modules[layer], modules[norm])
    for module in modules.values():
      for name, child in list(vars(module).items()):
        if child is modules[norm]:
          setattr(module, name, Identity())
  _check(model, folded, pairs, args, kwargs)
  return folded


def _pairs(model, args, kwargs):
  """(path of a layer, path of the BatchNorm that reads what it returns), each called once."""
  log = calls.trace(model, lambda model, batch: model(*batch[0], **batch[1]), (args, kwargs))
  count = collections.Counter(call.path for call in log)
  log = [call for call in log if count[call.path] == 1 and call.args]
  made = {id(call.result): call.path for call in log if issubclass(call.cls, FOLDED)}
  return [(made[id(call.args[0])], call.path) for call in log
          if issubclass(call.cls, nnx.BatchNorm) and id(call.args[0]) in made]


def _fold(layer, norm):
  """Multiplies the kernel by gamma / sqrt(var + epsilon), and moves the bias, in place."""
  read = lambda p, default: default if p is None else p[...].astype(jnp.float32)
  gain = read(norm.scale, 1.0) / jnp.sqrt(norm.var[...] + norm.epsilon)                 # [*lead, out]
  kernel = layer.kernel[...]
  shape = (*gain.shape[:-1], *(1,) * (kernel.ndim - gain.ndim), gain.shape[-1])
  layer.kernel[...] = (kernel.astype(jnp.float32) * gain.reshape(shape)).astype(kernel.dtype)
  bias = (read(layer.bias, 0.0) - norm.mean[...]) * gain + read(norm.bias, 0.0)
  layer.bias, layer.use_bias = nnx.Param(bias.astype(kernel.dtype)), True


def _check(model, folded, pairs, args, kwargs):
  """Raises if the outputs moved: another module reads what a layer gave to its BatchNorm."""

  @nnx.jit
  def run(model, args, kwargs):
    model.eval()
    return model(*args, **kwargs)

  for y, z in zip(*(jax.tree.leaves(run(nnx.clone(m), args, kwargs)) for m in (model, folded))):
    share = jnp.max(jnp.abs(z - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-6)
    if not share <= TOLERANCES.get(y.dtype, 0.0):
      raise ValueError(f'Folding {pairs} moves the outputs by {float(share):.2g} of the largest: what one of these '
                       'layers returns, or its kernel, is used elsewhere too. Fold a part of the model only.')


def reestimate_batch_norm(model, batches, apply=None):
  """A copy of `model` whose BatchNorms have the mean statistics of `batches`, under the weights as they are now.

  Args:
    model: float or quantized.
    batches: an iterable of what `apply` takes.
    apply: (model, batch) -> anything; `model(batch)` if not given.

  Returns:
    A model of the same class: the mean of the batches' means, and of their variances; nothing else changes.
  """
  apply = apply or (lambda model, batch: model(batch))
  working = nnx.clone(model)
  working.eval()
  for _, module in quantized.walk(working):
    if isinstance(module, nnx.BatchNorm):
      module.use_running_average, module.momentum = False, 0.0  # Statistics are the last batch's.

  @nnx.jit
  def statistics(working, batch):
    apply(working, batch)
    return nnx.state(working, nnx.BatchStat)

  total, count = None, 0
  for batch in batches:
    count += 1
    seen = jax.tree.map(np.asarray, statistics(working, batch))  # Copies: the next batch writes to `working`.
    total = seen if total is None else jax.tree.map(np.add, total, seen)
  if not count:
    raise ValueError('reestimate_batch_norm was given no batch: statistics come from the numbers in them. '
                     'Give an iterable with at least one; a generator is used up after one pass.')
  model = nnx.clone(model)
  nnx.update(model, jax.tree.map(lambda a: jnp.asarray(a / np.float32(count)), total))
  return model
