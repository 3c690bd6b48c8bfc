"""The config of the tests of meshes: a small Llama on Shakespeare's characters, or an MLP on digits."""

from configs import defaults
from tests.run import tiny


def get_config(arg=''):
  arg = defaults.parse_arg(arg, recipe='w8a8', model='llama', width=32, steps=4)
  if arg.model == 'mlp':
    config = tiny.get_config(f'quantizer={arg.recipe},steps={arg.steps}')
    config.eval.update(batch_size=125)                                   # No multiple of 8: not shared out.
    return config
  config = defaults.base()
  config.data.update(name='shakespeare', batch_size=16, test='test[:10%]')
  config.data.options.context_length = 16
  config.data.train_options.stride = 1
  config.model.update(name='decoder.llama', vocab_size=65, context_length=16, width=arg.width, layers=1, heads=4)
  if arg.recipe != 'float':
    config.recipe = dict(name=arg.recipe, rules={'embed': 'w8a16' if 'a16' in arg.recipe else 'w8a8'})
  config.objective = 'language'
  config.optimizer.update(name='sgd', learning_rate=0.03)
  config.total_steps = arg.steps
  config.eval.update(batch_size=64, every_steps=arg.steps)
  config.log_every_steps = 1
  config.log_every_seconds = 60
  return config
