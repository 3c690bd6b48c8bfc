"""The config of tests/launch/program.py: what launch/ reads of any config, and how the program is to behave."""

import ml_collections as mlc

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, bits=2, method='lsq')
  config = mlc.ConfigDict()
  config.seed = 0
  config.recipe = defaults.bits(arg.method, arg.bits)
  config.optimizer = mlc.ConfigDict(dict(name='adamw', learning_rate=1e-2))
  config.total_steps = 10
  config.eval = mlc.ConfigDict(dict(every_steps=2))
  config.step_seconds = 0.0
  config.crashing_seeds = ()
  return config
