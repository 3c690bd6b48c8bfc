"""The command line of a program: a config file, overrides of its leaves, and a workdir.

    --config configs/<file>.py[:arg] --workdir <dir> [--config.<leaf>=<value>]

The config is locked: a leaf that the file does not have is an error.
"""

import importlib.util
import json
import pathlib
import sys

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags

from qat.run import names

# Steps are counted, or divided, by these.
COUNTS = ('eval.every_steps', 'eval.batch_size', 'optimizer.accumulate_steps', 'log_every_steps',
          'checkpoint_every_steps', 'keep_checkpoints')
# What a run may change when it goes on: none of these touches a parameter, but for the order of sums on a mesh.
FREE = ('log_every_steps', 'log_every_seconds', 'checkpoint_every_steps', 'keep_checkpoints', 'trackers',
        'mesh.data', 'mesh.fsdp', 'mesh.sequence', 'mesh.model', 'sharding', 'activation_sharding')


def parse(argv, needs_config=True):
  """(config, workdir) of a program's arguments.

  Args:
    argv: list of str, without the program's name.
    needs_config: whether --config must be given; else it is read from the workdir.
  """
  source, argv = _split(argv)
  config = build(source).lock() if source else None
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'folder of everything the run leaves', flag_values=values)
  try:
    if source:
      config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    left = values(argv)
  except AttributeError as error:  # config_flags: the locked config has no such leaf.
    raise ValueError(_unknown_leaf(argv, source, config)) from error
  if len(left) > 1:
    raise ValueError(f'Arguments {left[1:]}: a program takes flags only. Write --config=... and --workdir=....')
  if values.workdir is None:
    raise ValueError('--workdir is not given: a run needs a folder for what it leaves. Add --workdir <dir>.')
  workdir = pathlib.Path(values.workdir).expanduser()
  if source:
    return values.config, workdir
  if needs_config:
    raise ValueError('--config is not given: there is nothing to run. Add --config configs/<file>.py[:arg].')
  return load(workdir), workdir


def _split(argv):
  """(the value of --config or None, ['qat', and the other arguments])."""
  source, rest, argv = None, ['qat'], iter(argv)
  for arg in argv:
    if arg == '--config':
      source = next(argv, None)
    elif arg.startswith('--config='):
      source = arg.split('=', 1)[1]
    else:
      rest.append(arg)
  return source, rest


def build(source):
  """The config of 'file.py[:arg]'."""
  path, *arg = source.split(':', 1)
  path = pathlib.Path(path)
  if not path.is_file():
    there = sorted(map(str, path.parent.glob('*.py'))) or sorted(map(str, pathlib.Path('configs').glob('*.py')))
    hint = names.suggest(path, there) if there else 'Check the path.'
    raise ValueError(f'Config file {str(path)!r} does not exist. {hint}')
  if path.suffix != '.py':
    raise ValueError(f'Config file {str(path)!r} is no Python file. Name one of configs/*.py.')
  folder = path.resolve().parent
  if folder.name == 'configs' and str(folder.parent) not in sys.path:  # Configs say `from configs import defaults`.
    sys.path.insert(0, str(folder.parent))
  spec = importlib.util.spec_from_file_location('config_file', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'Config file {str(path)!r} has no get_config. Name a file that defines get_config(arg).')
  return module.get_config(*arg)


def _unknown_leaf(argv, source, config):
  """The message for the first override whose leaf is not in the config."""
  there = [name for name, _ in leaves(config)]
  for arg in argv:
    if arg.startswith('--config.'):
      asked = arg[len('--config.'):].split('=', 1)[0]
      if not any(name == asked or name.startswith(asked + '.') for name in there):
        return f'--config.{asked}: {source} has no such key. {names.suggest(asked, there)}'
  return f'The overrides {[a for a in argv if a.startswith("--config.")]} do not fit {source}, whose keys are {there}.'


def leaves(config, prefix=''):
  """[(dotted name, value)] of everything in a config, dicts opened."""
  if not isinstance(config, (dict, config_dict.ConfigDict)):
    return [(prefix, config)]
  dot = prefix + '.' if prefix else ''
  return [leaf for key in config for leaf in leaves(config[key], dot + key)]


def plain(value):
  """A config as JSON holds it: dicts, lists, numbers, strings."""
  return json.loads(value.to_json_best_effort())


def load(workdir):
  """The config of an earlier run: workdir/config.json."""
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise ValueError(f'--workdir {str(workdir)!r}: there is no config.json, so no run started there. '
                     'Name the folder of a run, or give --config as well.')
  return config_dict.ConfigDict(_tuples(json.loads(path.read_text()))).lock()


def _tuples(value):
  """JSON's lists as the tuples that they were."""
  if isinstance(value, list):
    return tuple(_tuples(v) for v in value)
  return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def check_counts(config):
  """Raises at a count that is less than 1."""
  for name, value in leaves(config):
    if name in COUNTS and value < 1:
      raise ValueError(f'--config.{name}={value}: it is a whole number of 1 or more. Give one, or leave it out '
                       'for what the config file says.')


def check_same(config, workdir):
  """Raises when an earlier run in `workdir` had another config, naming the leaves that differ."""
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    return
  old, new = (dict(leaves(c)) for c in (json.loads(path.read_text()), plain(config)))
  absent = '(absent)'
  differ = [f'{k}: {old.get(k, absent)!r} there, {new.get(k, absent)!r} now' for k in sorted({*old, *new})
            if old.get(k, absent) != new.get(k, absent) and k not in FREE]
  if differ:
    raise ValueError(f'--workdir {str(workdir)!r} holds a run of another config; it cannot go on under this one. '
                     f'They differ in {"; ".join(differ)}. Choose another --workdir, or give the config it began with.')
