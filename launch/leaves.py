"""The config of a run, read as the program will read it, so that a slip of the pen fails before anything starts.

Configs are ml_collections files that import nothing of the library.
"""

import ast
import difflib
import functools
import importlib.util
import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from launch import grid


@functools.cache
def module(path):
  """The module of a config file."""
  path = pathlib.Path(path)
  if not path.is_file() or path.suffix != '.py':
    there = sorted(map(str, (path.parent if path.parent.is_dir() else pathlib.Path('configs')).glob('*.py')))
    raise ValueError(f'Config file {str(path)!r} does not exist. {nearest(str(path), there)}')
  folder = path.resolve().parent
  if folder.name == 'configs' and str(folder.parent) not in sys.path:  # Configs say `from configs import defaults`.
    sys.path.insert(0, str(folder.parent))
  spec = importlib.util.spec_from_file_location('config_file', path)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  if not hasattr(found, 'get_config'):
    raise ValueError(f'Config file {str(path)!r} has no get_config. Name a file that defines get_config(arg).')
  return found


@functools.cache
def built(source):
  """The config of 'file.py[:arg]', locked, not to be written to."""
  path, *arg = source.split(':', 1)
  return module(path).get_config(*arg).lock()


def resolved(config, settings):
  """The whole config of a run, as JSON holds it.

  Args:
    config: 'file.py[:arg]'.
    settings: {key: value as text}.
  """
  source = grid.source(config, settings)
  check(source, settings)
  values, words = flags.FlagValues(), ['launch', *grid.overrides(settings)]
  config = built(source).copy_and_resolve_references().lock()
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=words)
    values(words)
  except (flags.Error, ValueError, TypeError, AttributeError) as error:
    raise ValueError(f'{" ".join(words[1:])} does not fit {source}: {" ".join(str(error).split())} Give a value of '
                     "the type that the config file's has.") from error
  return json.loads(values.config.to_json_best_effort())


def check(source, settings):
  """Raises at a key that the config does not have."""
  there = keys(source)
  for key in settings:
    if key.startswith(':') or key in there:  # A wrong argument fails in get_config, which knows those that it has.
      continue
    raise ValueError(f'Key {key!r}: {source} has none of that name. '
                     f'{suggest(key, there + [":" + a for a in arguments(source)])}')


def keys(source):
  """The dotted names of all leaves of a config."""
  return sorted(_leaves(json.loads(built(source).to_json_best_effort())))


def _leaves(tree, prefix=''):
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key


def arguments(source):
  """The names that the config file passes to defaults.parse_arg: what may stand behind its colon."""
  tree = ast.parse(pathlib.Path(source.partition(':')[0]).read_text())
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  return [word.arg for call in calls if getattr(call.func, 'attr', '') == 'parse_arg' for word in call.keywords]


def suggest(name, there):
  """'Did you mean ...?': a name of the same last part, of those initials, or the nearest; else the whole list.

  >>> suggest('quantizer.bits', ['seed', ':bits'])
  "Did you mean ':bits'?"
  >>> suggest('optimizer.lr', ['optimizer.name', 'optimizer.learning_rate'])
  "Did you mean 'optimizer.learning_rate'?"
  """
  last = grid.short(name)
  same = [n for n in there if grid.short(n) == last]
  initials = [n for n in there if ''.join(part[:1] for part in grid.short(n).split('_')) == last]
  near = same or initials
  return f'Did you mean {near[0]!r}?' if near else nearest(name, there)


def nearest(name, there):
  """'Did you mean ...?' by letters; else the whole list."""
  near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
  return f'Did you mean {near[0]!r}?' if near else f'Choose among {", ".join(there)}.'
