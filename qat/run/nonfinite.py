"""Which layer first went wrong, once a loss or gradient is not finite.

A slow, eager pass over the very state and batch of the failing step: parameters, then the
outputs of each module in the order in which they were called, then gradients.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.run import errors
from qat.run import state as states


class Probe(nnx.Module):
  """Stands in for a module and notes whether what it puts out is finite."""

  def __init__(self, inner, path, seen):
    self.inner, self.path, self.seen = inner, path, nnx.static(seen)

  def __call__(self, *args, **kwargs):
    y = self.inner(*args, **kwargs)
    # Inside scan and vmap there is no number to look at: the module around it is named instead.
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(y)):
      self.seen.append((self.path, is_finite(y)))
    return y

  def __getattr__(self, name):
    return getattr(object.__getattribute__(self, 'inner'), name)


def is_finite(tree):
  """Whether every number in a pytree of arrays is finite."""
  arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return all(bool(jnp.isfinite(x).all()) for x in arrays)


def probed(model, seen):
  """A copy of `model` whose modules report to `seen`, in the order of their calls."""
  model = nnx.clone(model)
  for path, parent in list(nnx.iter_modules(model)):
    if 'quantizers' in path:  # They are part of their layer, which is the one to name.
      continue
    for name, child in list(nnx.iter_children(parent)):
      if callable(child) and name != 'quantizers':
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
  if not is_finite(batch):
    bad = [name for name, x in batch.items() if not is_finite(jnp.asarray(x))]
    return f"the batch's {bad[0]!r}, and so the first layer {first_layer(skeleton, objective, state, batch)!r}"
  if path := first_layer(skeleton, objective, state, batch):
    return f'the output of layer {path!r}'
  gradients, values, _ = states.gradient(skeleton, objective, state, batch)
  for path, x in reversed(gradients.items()):  # Backward order: nearest to the loss first.
    if not is_finite(x):
      return f'the gradient of {path!r}'
  if not is_finite(values['loss']):
    return 'the loss, while every layer was finite'
  return 'the norm of the gradient, while every gradient was finite: it overflows float32'


def first_layer(skeleton, objective, state, batch):
  """The path of the first module called whose output is not finite, or None."""
  seen = []
  model = skeleton.join(state.params, state.rest)
  model.train()
  probed(model, seen)(objective.inputs(batch))
  return next((path for path, finite in seen if not finite), None)


def stop(skeleton, objective, state, batch, workdir):
  """Saves what is needed to look into it, and raises with the name of the layer."""
  step = int(state.step) + 1
  path = workdir / f'nonfinite_{step}.npz'
  arrays = {f'params/{k}': v for k, v in state.params.items()} | {f'batch/{k}': v for k, v in batch.items()}
  np.savez(path, **{k: np.asarray(v) for k, v in arrays.items()})
  what = culprit(skeleton, objective, state, batch)
  raise errors.NonFinite(
      f'Step {step}: {what} is not finite (NaN or infinite). Training stopped before the step took effect; '
      f'its parameters and batch are in {path}. Lower optimizer.learning_rate, set optimizer.clip_norm, or look at that layer.')
