r"""MLP 64-128-128-10 on 8x8 digits, any quantizer at any width.

Seed 0, 500 test images: float 97.8 %, LSQ W2A2 with 8-bit ends 97.0 %. 10-20 seconds on 2 CPU cores.
configs/quickstart.py has the means over seeds.
python -m qat.run.train --config configs/digits.py:quantizer=lsq,bits=2 --workdir /tmp/digits
Most wanted: `:quantizer=float`, `:bits=4`, `:first_last=2` (bits of the first and last layer; 8 unless said, 0 for
floats), `:optimizer=sgd`, `:recipe=` a name of qat/nn/recipes.py in place of quantizer and bits, `:start=` the workdir
of a finished float run to begin from.
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, quantizer='lsq', bits=2, first_last=8, recipe='', optimizer='adamw', start='',
                           smoke=False)
  config = defaults.base()
  config.data.name = 'digits'
  config.init_from = arg.start
  config.model.update(name='mlp.MLP', sizes=(64, 128, 128, 10))
  if arg.quantizer != 'float':
    config.recipe = dict(name=arg.recipe) if arg.recipe else defaults.bits(arg.quantizer, arg.bits)
    ends = defaults.bits(arg.quantizer, arg.first_last) if arg.first_last else 'float'
    config.recipe.rules = {'layers/0|layers/2': ends}
  config.optimizer.update(name='adamw', learning_rate=2e-3, weight_decay=1e-4)
  if arg.optimizer == 'sgd':  # With momentum, at the rate of papers on steps.
    config.optimizer.update(name='sgd', learning_rate=0.1)
    config.optimizer.options.momentum = 0.9
  config.total_steps = 600
  config.eval.update(batch_size=500, every_steps=100)
  config.checkpoint_every_steps = 100
  if arg.smoke:
    defaults.smoke(config)
  return config
