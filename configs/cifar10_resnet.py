r"""ResNet-20 on CIFAR-10 by PACT with DoReFa's weights, or any quantizer. https://arxiv.org/abs/1805.06085

The paper's error in %: 8.4 at 5 bits, 9.2 at 4, 9.4 at 3, 11.1 at 2; reproduced by others: 8.4,
9.11, 9.91, 12.93. Not run here: by 10,000 images a second, an assumption and no measurement, 200 epochs take
17 minutes on one GPU.
python -m qat.run.train --config configs/cifar10_resnet.py:quantizer=pact,bits=2 --workdir runs/r20_pact \
    --config.data.data_dir=D
Most wanted: `:quantizer=lsq`, `:quantizer=dorefa`, `:quantizer=float`, `:init_from=` the workdir of a float run.
docs/data.md says how D is made.

Differences from the paper: shortcuts are projections (qat/models/resnet.py); the rate falls by a cosine; clip points do
not decay.
"""

from configs import defaults

IMAGES, EPOCHS, BATCH = 50_000, 200, 128


def get_config(arg=''):
  arg = defaults.parse_arg(arg, quantizer='pact', bits=4, layers=20, init_from='', smoke=False)
  config = defaults.base()
  config.data.update(name='cifar10', batch_size=BATCH)
  config.data.train_options.update(augment=(dict(name='padded_crop', padding=4), dict(name='flip')), mixup=0.0,
                                   cutmix=0.0, smoothing=0.0)
  config.model.update(name='resnet.cifar', layers=arg.layers, classes=10)
  config.init_from = arg.init_from
  if arg.quantizer != 'float':
    config.recipe = defaults.bits(arg.quantizer, arg.bits)
    config.recipe.rules = {'stem|head': 'float'}
  config.objective = 'soft_classification'
  config.optimizer.update(name='sgd', learning_rate=0.1, weight_decay=2e-4, clip_norm=0.0)
  config.optimizer.options.update(momentum=0.9, nesterov=True)
  config.total_steps = EPOCHS * IMAGES // BATCH
  config.eval.update(batch_size=500, every_steps=10 * IMAGES // BATCH)
  config.checkpoint_every_steps = 10 * IMAGES // BATCH
  config.log_every_steps = 100
  if arg.smoke:
    config.model.layers = 8
    defaults.smoke(config)
  return config
