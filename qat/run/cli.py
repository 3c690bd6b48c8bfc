"""The console script: `qat <program> ...` runs the program, and turns wrong input into one paragraph.

Exit codes: 0 done (also after SIGTERM, when the run was saved), 2 wrong input or a stopped run,
1 a defect, with its traceback.
"""

import importlib
import os
import pathlib
import sys

from absl import logging
import jax

from qat.run import config as configs
from qat.run import errors
from qat.run import hosts
from qat.run import names

# Program -> whether it needs --config; those that do not read the one in the workdir. None: it reads its own flags.
PROGRAMS = dict(train=True, finetune=None, merge=None, ptq=True, evaluate=False, report=False, quickstart=True,
                reproduce=None)
MESHES = ('train', 'finetune', 'ptq')  # Programs that run on many devices.
SHARDED = ('--config.mesh', '--config.sharding', '--config.activation_sharding')
CACHE_FROM_SECONDS = 0.5  # Faster compiles than this are not worth a file.


def main(argv=None):
  """Runs one program. Returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage())
    return 0 if argv else 2
  try:
    run(*argv)
  except (Exception, KeyboardInterrupt) as error:
    text = errors.paragraph(error)
    if text is None:
      raise
    print(f'qat {argv[0]}: {text}', file=sys.stderr)
    return 2
  return 0


def run(program, *argv):
  """Runs `program` under the config that `argv` names."""
  if program not in PROGRAMS:
    raise ValueError(f'Program {program!r} does not exist. {names.suggest(program, PROGRAMS)}')
  module = importlib.import_module(f'qat.run.{program}')
  if {'-h', '--help'} & set(argv):
    print(module.__doc__)
    return
  flags, argv = hosts.split(argv)
  logging.set_verbosity(logging.FATAL)  # Orbax logs every error that it raises, a page for each of its threads.
  compilation_cache()
  if program not in MESHES:
    check_alone(program, flags, argv)
    return start(program, module, argv)
  with hosts.session(flags):
    return start(program, module, argv)


def start(program, module, argv):
  """Runs the module of a program."""
  if PROGRAMS[program] is None:
    return module.main(argv)
  if program == 'report' and argv and not argv[0].startswith('-'):  # A page of experiments/, or runs to compare.
    is_page = len(argv) == 1 and not (pathlib.Path(argv[0]) / 'result.json').is_file()
    return importlib.import_module('qat.run.pages' if is_page else 'qat.run.comparison').main(*argv)
  if program == 'train' and '--plan' in argv:
    config, _ = configs.parse(['--workdir=.', *(a for a in argv if a != '--plan')])
    return print(importlib.import_module('qat.run.train_plan').plan(config))
  module.main(*configs.parse(argv, needs_config=PROGRAMS[program]))


def check_alone(program, flags, argv):
  """Raises at what only programs of many devices know."""
  asked = [f'--{name}' for name in flags] + [a.split('=')[0] for a in argv if a.startswith(SHARDED)]
  if asked:
    raise ValueError(f'{", ".join(asked)}: qat {program} runs on one device, in one process. Leave it out; '
                     f'{", ".join(MESHES)} run on many.')


def usage():
  """What can be run."""
  lines = [__doc__.splitlines()[0], '',
           'qat <program> --config configs/<file>.py[:arg] --workdir <dir> [--config.<leaf>=<value>]', '']
  for program in PROGRAMS:
    doc = importlib.import_module(f'qat.run.{program}').__doc__
    lines.append(f'  {program:<12}{doc.splitlines()[0]}')
  return '\n'.join(lines)


def compilation_cache():
  """Keeps compiled programs on disk, unless the user keeps them elsewhere."""
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  root = pathlib.Path(os.environ.get('QAT_CACHE', '~/.cache/qat')).expanduser()
  jax.config.update('jax_compilation_cache_dir', str(root / 'jax'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', CACHE_FROM_SECONDS)
