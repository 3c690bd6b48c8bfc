"""From a few words to many commands: a pure function, with no process, file or clock in it.

    --set recipe.weight_bits=2,3,4 --set seed=0..4      every combination, the last key fastest
    --set :bits=2,3,4                                   an argument of the config file: configs/mnist.py:bits=2
    --search optimizer.learning_rate=log:1e-4..1e-1     a range (log or not) of floats or integers, or choices
"""

import dataclasses
import hashlib
import itertools
import json
import re

RANGE = re.compile(r'(log:)?([^,]+)\.\.([^,]+)')
NOT_NAME = re.compile('[^A-Za-z0-9_=.,+-]')
NAME_LETTERS = 60  # Of a folder's name, before the hash.


@dataclasses.dataclass(frozen=True)
class Choices:
  """One of some values, as text."""
  values: tuple


@dataclasses.dataclass(frozen=True)
class Between:
  """A number from `low` to `high`, both included; integers when both are. `log`: evenly in its logarithm."""
  low: float
  high: float
  log: bool = False


def split(text):
  """Values at the commas that stand in no bracket.

  >>> split('2,3,(64, 10)')
  ['2', '3', '(64, 10)']
  """
  values, depth = [''], 0
  for letter in text:
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and depth == 0:
      values.append('')
    else:
      values[-1] += letter
  return [value.strip() for value in values]


def assignment(text, flag):
  """('key', 'values') of 'key=values'."""
  key, equals, values = text.partition('=')
  if not (key.strip(':') and equals and values and all(split(values))):
    raise ValueError(f'{flag} {text!r} is no <key>=<value>,<value>. Write it as {flag} seed=0,1,2 or {flag} seed=0..2.')
  return key, values


def number(text):
  """An int or a float; None when the text is neither."""
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  return None


def listed(text):
  """What --set says: ('key', [values as text]).

  >>> listed('seed=0..3')
  ('seed', ['0', '1', '2', '3'])
  """
  key, values = assignment(text, '--set')
  found = []
  for value in split(values):
    limits = RANGE.fullmatch(value)
    low, high = (number(x) for x in limits.group(2, 3)) if limits else (None, None)
    if isinstance(low, int) and isinstance(high, int) and not limits.group(1):
      if low > high:
        raise ValueError(f'--set {text!r}: {value} is empty. Write the smaller number first.')
      found += map(str, range(low, high + 1))
    elif limits and low is not None:
      raise ValueError(f'--set {text!r}: {value} is a range of no whole numbers, which has no list of values. List '
                       f'them with commas, or search them: --search {text}.')
    else:
      found.append(value)
  if len(set(found)) < len(found):
    raise ValueError(f'--set {text!r} has a value twice. Give each once.')
  return key, found


def searched(text):
  """What --search says: ('key', Between or Choices).

  >>> searched('optimizer.learning_rate=log:1e-4..1e-1')
  ('optimizer.learning_rate', Between(low=0.0001, high=0.1, log=True))
  """
  key, values = assignment(text, '--search')
  limits = RANGE.fullmatch(values)
  if not limits:
    if len(split(values)) < 2:
      raise ValueError(f'--search {text!r} has one value: there is nothing to search. Use --set, or write a range: '
                       f'{key}=1e-4..1e-1, {key}=log:1e-4..1e-1.')
    return key, Choices(tuple(split(values)))
  low, high = (number(x) for x in limits.group(2, 3))
  if low is None or high is None or not low < high:
    raise ValueError(f'--search {text!r}: {values} is no range from a smaller number to a larger one. Write it as '
                     f'{key}=1e-4..1e-1.')
  if limits.group(1) and low <= 0:
    raise ValueError(f'--search {text!r}: a logarithm needs numbers above 0. Begin there, or leave out log:.')
  return key, Between(low, high, bool(limits.group(1)))


def combinations(axes):
  """Every choice of one value a key, the last key fastest.

  Args:
    axes: {key: [values]}.

  >>> combinations({'bits': ['2', '4'], 'seed': ['0', '1']})[1]
  {'bits': '2', 'seed': '1'}
  """
  return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def source(config, settings):
  """A config file with the settings of its argument: those whose key begins with a colon.

  >>> source('configs/mnist.py:quantizer=lsq', {':bits': '2', 'seed': '0'})
  'configs/mnist.py:quantizer=lsq,bits=2'
  """
  path, _, arg = config.partition(':')
  args = [arg] if arg else []
  args += [f'{key[1:]}={value}' for key, value in settings.items() if key.startswith(':')]
  return f'{path}:{",".join(args)}' if args else path


def overrides(settings):
  """The other settings, as flags."""
  return [f'--config.{key}={value}' for key, value in settings.items() if not key.startswith(':')]


def command(program, config, settings, workdir):
  """The words of a run.

  >>> ' '.join(command(('qat', 'train'), 'configs/mnist.py', {':bits': '2', 'seed': '0'}, 'runs/a'))
  'qat train --config configs/mnist.py:bits=2 --config.seed=0 --workdir runs/a'
  """
  return (*program, '--config', source(config, settings), *overrides(settings), '--workdir', str(workdir))


def digest(program, config):
  """Eight letters that stand for a whole config, as JSON, and the program that runs it."""
  text = json.dumps([list(program), config], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def folder(settings, digest):
  """The name of a run's folder: its settings for people, its digest for the rest.

  >>> folder({':bits': '2', 'optimizer.learning_rate': '0.01'}, '1a2b3c4d')
  'bits=2,learning_rate=0.01-1a2b3c4d'
  """
  said = ','.join(f'{short(key)}={value}' for key, value in settings.items())
  return f'{NOT_NAME.sub("_", said)[:NAME_LETTERS] or "run"}-{digest}'


def short(key):
  """The last part of a key."""
  return key.lstrip(':').rsplit('.', 1)[-1]
