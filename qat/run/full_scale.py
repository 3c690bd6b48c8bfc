"""The papers' own settings, which experiments/full_scale.py declares: `qat reproduce <paper> --scale full` prints them.

    SETTINGS = {'lsq': dict(paper='LSQ, https://...', setting='ResNet-18 on ImageNet', hardware='8 GPUs of 80 GB',
                            takes='1.6 hours', expected='67.6 % at 2 bits', commands=['qat train --config ...', ...])}

The file is data and imports nothing of qat; a paper may have a setting and no page yet.
"""

import pathlib
import runpy

from qat.run import names

KEYS = ('paper', 'setting', 'hardware', 'takes', 'expected', 'commands')


def load(experiments):
  """({paper: its setting}, where words in capitals of commands come from) of a folder of pages."""
  path = pathlib.Path(experiments) / 'full_scale.py'
  if not path.is_file():
    raise ValueError(f'--experiments {str(experiments)!r}: it has no full_scale.py, which declares settings. Name the '
                     'folder that has one.')
  said = runpy.run_path(str(path))
  for name, about in said['SETTINGS'].items():
    if set(about) != set(KEYS):
      raise ValueError(f'{path}: {name!r} has {sorted(about)}, and a setting has {list(KEYS)}. Give these.')
  return said['SETTINGS'], said['DATA']


def text(name, experiments):
  """The setting of a paper: what it needs, takes and gives, and its commands."""
  settings, data = load(experiments)
  if name not in settings:
    raise ValueError(f'{name!r}: no setting of that name is in {experiments}/full_scale.py. '
                     f'{names.suggest(name, settings)}')
  about = settings[name]
  rows = [f'{key:<10}{about[key]}' for key in KEYS if key != 'commands']
  needed = [data] if any('DATA' in command for command in about['commands']) else []
  return '\n'.join([*rows, 'commands  not run here' + (f'; {needed[0]}' if needed else '.'),
                    *(f'  {command}' for command in about['commands'])])
