"""Names in configs become functions and classes by getattr; a wrong one says what is near."""

import difflib


def resolve(module, name, what):
  """`module.name`, where `name` may be dotted.

  Args:
    module: a module, or any object with attributes.
    name: str, such as 'mlp.MLP'.
    what: str, what the name stands for, for the error.

  >>> import math
  >>> resolve(math, 'sqrt', 'function')(9.0)
  3.0
  """
  thing = module
  for part in name.split('.'):
    if part.startswith('_') or not hasattr(thing, part):
      there = sorted(n for n in dir(thing) if not n.startswith('_'))
      raise ValueError(f'{what} {name!r}: {getattr(thing, "__name__", thing)} has no {part!r}. {suggest(part, there)}')
    thing = getattr(thing, part)
  return thing


def suggest(name, names):
  """'Did you mean ...?', or the whole list when nothing is near.

  >>> suggest('quantiser', ['quantizer', 'bits'])
  "Did you mean 'quantizer'?"
  """
  names = [str(n) for n in names]
  near = difflib.get_close_matches(str(name), names, n=1)
  return f'Did you mean {near[0]!r}?' if near else f'Choose one of {", ".join(names)}.'
