"""The config of the tests of qat/run: a small network on digits, with every kind of state."""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, quantizer='float', bits=4, steps=4)
  config = defaults.base()
  config.data.update(name='digits', batch_size=16)
  config.model.update(name='mlp.MLP', sizes=(64, 16, 10))
  if arg.quantizer != 'float':
    config.recipe = defaults.bits(arg.quantizer, arg.bits)
    config.recipe.rules = {'layers/0': defaults.bits(arg.quantizer, 8)}
  config.optimizer.learning_rate = 1e-2
  config.total_steps = arg.steps
  config.eval.update(batch_size=250, every_steps=arg.steps)
  config.log_every_steps = 1
  config.log_every_seconds = 60
  config.checkpoint_every_steps = 2
  return config
