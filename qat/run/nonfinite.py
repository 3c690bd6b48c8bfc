"""Which layer first went wrong, once a loss or gradient is not finite.

A slow, eager pass over the very state and batch of the failing step: parameters, then the
outputs of each module in the order in which they were called, then gradients.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.run import errors
from qat.run import hosts
from qat.run import state as states


class Probe(nnx.Module):
  """Stands in for a module and notes the largest number that it puts out."""

  def __init__(self, inner, path, seen):
    self.inner, self.path, self.seen = inner, path, nnx.static(seen)

  def __call__(self, *args, **kwargs):
    y = self.inner(*args, **kwargs)
    # Inside scan and vmap there is no number to look at: the module around it is named instead.
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(y)):
      self.seen.append((self.path, largest(y)))
    return y

  def __getattr__(self, name):
    return getattr(object.__getattribute__(self, 'inner'), name)


def largest(tree):
  """The largest magnitude in a pytree of arrays: NaN or infinite if one number is."""
  arrays = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
  return float(max((jnp.abs(x.astype(jnp.float32)).max() for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)),
                   key=lambda m: math.inf if jnp.isnan(m) else m, default=0.0))


def is_finite(tree):
  """Whether every number in a pytree of arrays is finite."""
  return all(math.isfinite(largest(x)) for x in jax.tree.leaves(tree))


def probed(model, seen):
  """A copy of `model` whose modules report to `seen`, in the order of their calls."""
  model = nnx.clone(model)
  for path, parent in list(nnx.iter_modules(model)):
    if 'quantizers' in path:  # They are part of their layer, which is the one to name.
      continue
    for name, child in list(nnx.iter_children(parent)):
      if isinstance(child, nnx.Module) and callable(child) and name != 'quantizers':
        probe = Probe(child, '/'.join(map(str, (*path, name))), seen)
        if isinstance(parent, nnx.List):
          parent[name] = probe
        else:
          setattr(parent, name, probe)
  return model


def culprit(skeleton, objective, state, batch):
  """What first was not finite, in words, such as "the output of layer 'layers/0'"."""
  for path, x in state.params.items():
    if not is_finite(x):
      return f'the parameter {path!r}'
  outputs = layer_outputs(skeleton, objective, state, batch)
  first = next((path for path, size in outputs if not math.isfinite(size)), None)
  for name, x in batch.items():
    if not is_finite(x):
      return f"the batch's {name!r}, and so the output of layer {first!r}"
  if first is not None:
    return f'the output of layer {first!r}'
  gradients, values, _ = states.gradient(skeleton, objective, state, batch)
  for path, x in reversed(gradients.items()):  # Backward order: nearest to the loss first.
    if not is_finite(x):
      return f'the gradient of {path!r}'
  sizes = dict(outputs) if not is_finite(values['loss']) else {path: largest(x) for path, x in gradients.items()}
  path = max(sizes, key=sizes.get)
  if not is_finite(values['loss']):
    return f'the loss (every layer was finite; the largest output, {sizes[path]:.3g}, is that of layer {path!r})'
  return f'the norm of the gradient (every gradient was finite; the largest, {sizes[path]:.3g}, is that of {path!r})'


def layer_outputs(skeleton, objective, state, batch):
  """[(path of a module, the largest magnitude in its output)], in the order of the calls."""
  seen = []
  model = skeleton.join(state.params, state.rest)
  model.train()
  probed(model, seen)(objective.inputs(batch))
  return seen


def stop(skeleton, objective, state, batch, workdir):
  """Saves what is needed to look into it, and raises with the name of the layer."""
  state, batch = hosts.local((state, batch))
  skeleton = dataclasses.replace(skeleton, base=hosts.local(skeleton.base))
  step = int(state.step) + 1
  path = workdir / f'nonfinite_{step}.npz'
  arrays = {f'params/{k}': v for k, v in state.params.items()} | {f'batch/{k}': v for k, v in batch.items()}
  if hosts.is_first():
    np.savez(path, **{k: np.asarray(v) for k, v in arrays.items()})
  what = culprit(skeleton, objective, state, batch)
  raise errors.NonFinite(
      f'Step {step}: {what} is not finite (NaN or infinite). Training stopped before the step took effect; its '
      f'parameters and batch are in {path}. Lower optimizer.learning_rate, set optimizer.clip_norm, or look at '
      'that layer.')
