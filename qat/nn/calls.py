"""Calls: which module is called with what, seen by tracing a model. One traced array is one array of the forward."""

import dataclasses

from flax import nnx

from qat.nn import quantized


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a module in a trace; a list of them keeps the traced arrays alive, so that their ids stay theirs."""
  path: str
  cls: type
  args: tuple
  kwargs: dict
  result: object


def trace(model, apply, batch):
  """Every call of a module below `model` in one traced forward in evaluation mode, in the order in which they began.

  Args:
    model: any nnx.Module; it stays as it is.
    apply: (model, batch) -> anything.
    batch: arrays, or their shapes.

  Returns:
    list of Call.
  """
  watched, log = nnx.clone(model), []
  watched.eval()
  for path, module in list(quantized.walk(watched)):
    if path and callable(module):
      module.__class__ = _recorded(type(module), path, log)
  nnx.eval_shape(lambda model, batch: apply(model, batch), watched, batch)
  return [call for call in log if call is not None]


def _recorded(cls, path, log):
  """A subclass of a module class that logs its calls."""

  def note(forward, self, args, kwargs):
    place = len(log)
    log.append(None)
    result = forward(self, *args, **kwargs)
    log[place] = Call(path, cls, args, kwargs, result)
    return result

  class Recorded(cls):

    def __call__(self, *args, **kwargs):
      return note(cls.__call__, self, args, kwargs)

  if issubclass(cls, nnx.Embed):  # A tied head is another call of its layer.
    Recorded.attend = lambda self, *args, **kwargs: note(cls.attend, self, args, kwargs)
  return Recorded
