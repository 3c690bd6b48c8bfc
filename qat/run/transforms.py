"""Transforms: what `qat ptq` does to the float network before it is quantized; none changes its function.

    config.transforms = (dict(name='smooth', alpha=0.5), ...)
"""

import inspect
import re

from flax import nnx
import jax

from qat.core import hadamard
from qat.nn import quantized
from qat.ptq import equalize as equalization
from qat.ptq import links
from qat.ptq import rotate as rotations
from qat.ptq import smooth as smoothing
from qat.run import names
from qat.run import tasks


def smooth(model, task, alpha=0.5):
  """SmoothQuant, through the norms, and what links the task names."""
  found = linked(model, task)
  if not found:
    raise ValueError("transform 'smooth': no norm of this network is read by linear layers alone, so none can take up "
                     "a factor. Use 'smooth_inputs', which divides at the layers' doors.")
  targets = [path for link in found for path in link.targets]
  return smoothing.smooth(model, smoothing.largest(model, targets, task.batches, tasks.call), found, alpha)


def smooth_inputs(model, task, layers='.*', alpha=0.5):
  """SmoothQuant at the door of each Linear layer whose path matches `layers`, which then divides its input itself."""
  paths = [path for path, m in quantized.walk(model) if isinstance(m, nnx.Linear) and re.fullmatch(layers, path)]
  if not paths:
    raise ValueError(f"transform 'smooth_inputs': no Linear layer matches {layers!r}. Write a regular expression for "
                     'whole paths.')
  return smoothing.smooth_inputs(model, smoothing.largest(model, paths, task.batches, tasks.call), paths, alpha)


def rotate(model, task, seed=0, online=True):
  """QuaRot: random Hadamard rotations of the residual stream and of the values' heads, folded into a decoder's weights.

  `online` also turns queries and keys after RoPE, and what the last layer of each ffn reads, while the model runs.
  """
  config, args = model.config, task.batches[0]
  keys = jax.random.split(jax.random.key(seed))
  stream = rotations.resolve(model, rotations.TIED_DECODER if config.tied_head else rotations.DECODER, *args)
  model, stream = rotations.fold_norms(model, stream)
  model = rotations.rotate_stream(model, stream, hadamard.randomized(keys[0], config.width))
  heads = links.resolve(model, links.heads(config.head_dim), *args)
  model = rotations.rotate_heads(model, heads, hadamard.randomized(keys[1], config.head_dim))
  return rotations.rotate_inputs(rotations.rotate_scores(model)) if online else model


def equalize(model, task):
  """Cross-layer equalization through the links of the network."""
  return equalization.equalize(model, linked(model, task))


def linked(model, task):
  """The links of a network: those that tracing sees, and those of the task that it has."""
  args = task.batches[0]
  there = [path for path, _ in quantized.walk(model)]
  patterns = [p for p in task.links if any(re.fullmatch(p.source, path) for path in there)]
  return (*links.find(model, *args), *(links.resolve(model, patterns, *args) if patterns else ()))


TRANSFORMS = dict(smooth=smooth, smooth_inputs=smooth_inputs, rotate=rotate, equalize=equalize)


def apply(task, wanted):
  """The task's model after each of `wanted`, in order: dicts of a name and options."""
  model = task.model
  for options in wanted:
    options = dict(options)
    name = options.pop('name', None)
    if name not in TRANSFORMS:
      raise ValueError(f'transform {name!r}: there is none of that name. {names.suggest(name, TRANSFORMS)}')
    known = list(inspect.signature(TRANSFORMS[name]).parameters)[2:]
    if unknown := sorted(set(options) - set(known)):
      raise ValueError(f'transform {name!r}: {unknown} mean nothing to it. It takes {known}.')
    model = TRANSFORMS[name](model, task, **options)
  return model
