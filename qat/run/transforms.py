"""Transforms: what `qat ptq` does to the float network before it is quantized; none changes its function.

    config.transforms = (dict(name='smooth', alpha=0.5), ...)
"""

import inspect
import re

from flax import nnx

from qat.nn import quantized
from qat.ptq import links
from qat.ptq import smooth as smoothing
from qat.run import names
from qat.run import tasks


def smooth(model, task, alpha=0.5):
  """SmoothQuant, through the norms, and what links the task names."""
  found = linked(model, task)
  if not found:
    raise ValueError("transform 'smooth': no norm of this network is read by linear layers alone, so none can take up a "
                     "factor. Use 'smooth_inputs', which divides at the layers' doors.")
  targets = [path for link in found for path in link.targets]
  return smoothing.smooth(model, smoothing.largest(model, targets, task.batches, tasks.call), found, alpha)


def smooth_inputs(model, task, layers='.*', alpha=0.5):
  """SmoothQuant at the door of each Linear layer whose path matches `layers`, which then divides its input itself."""
  paths = [path for path, m in quantized.walk(model) if isinstance(m, nnx.Linear) and re.fullmatch(layers, path)]
  if not paths:
    raise ValueError(f"transform 'smooth_inputs': no Linear layer matches {layers!r}. Write a regular expression for "
                     'whole paths.')
  return smoothing.smooth_inputs(model, smoothing.largest(model, paths, task.batches, tasks.call), paths, alpha)


def linked(model, task):
  """The links of a network: those that tracing sees, and those of the task that it has."""
  args = task.batches[0]
  there = [path for path, _ in quantized.walk(model)]
  patterns = [p for p in task.links if any(re.fullmatch(p.source, path) for path in there)]
  return (*links.find(model, *args), *(links.resolve(model, patterns, *args) if patterns else ()))


TRANSFORMS = dict(smooth=smooth, smooth_inputs=smooth_inputs)


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
