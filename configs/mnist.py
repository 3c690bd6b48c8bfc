r"""A small CNN on MNIST, any quantizer at any width.

Seed 0, the official 10,000 test images: float 99.14 %, LSQ W2A2 with 8-bit ends 98.89 %. 3 epochs: 1.5 and 5 minutes
on 2 busy CPU cores.
python -m qat.run.train --config configs/mnist.py:quantizer=lsq,bits=2 --workdir /tmp/mnist
Most wanted: `:quantizer=float`, `:bits=4`, `:first_last=2` (bits of the first and last layer; 8 unless said).
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, quantizer='lsq', bits=2, first_last=8, smoke=False)
  config = defaults.base()
  config.data.update(name='mnist', batch_size=128)
  config.model.update(name='cnn.CNN', channels=(16, 32, 64))
  if arg.quantizer != 'float':
    config.recipe = defaults.bits(arg.quantizer, arg.bits)
    config.recipe.rules = {'blocks/0/conv|head': defaults.bits(arg.quantizer, arg.first_last)}
  config.optimizer.update(name='adamw', learning_rate=4e-3, weight_decay=1e-4)
  config.schedule.warmup_steps = 50
  config.total_steps = 1290  # 3 epochs: 3 * 55000 / 128.
  config.eval.update(batch_size=500, every_steps=430)
  config.checkpoint_every_steps = 430
  if arg.smoke:
    defaults.smoke(config)
  return config
