"""The folder of a run: made, tried out, and claimed by one config."""

import json
import pathlib
import tempfile

from qat.run import checkpoint
from qat.run import config as configs
from qat.run import hosts
from qat.run import metrics


def begin(workdir, config):
  """Makes the folder, checks that it can be written and that no other config began there.

  Returns:
    pathlib.Path, absolute.
  """
  workdir = pathlib.Path(workdir).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ValueError(f'--workdir {str(workdir)!r} cannot be written: {error.strerror or error}. '
                     'Choose a folder that you own, or ask for write permission.') from error
  if any(checkpoint.steps(folder) for folder in (workdir, workdir / 'solved')):  # Else there is nothing to go on with.
    configs.check_same(config, workdir)
  if hosts.is_first():
    metrics.write(workdir / 'config.json', json.dumps(configs.plain(config), indent=2) + '\n')
  return workdir
