r"""ResNet-18 and 50 on ImageNet in 2 to 8 bits by LSQ, from a float network. https://arxiv.org/abs/1902.08153

The paper's top-1 in %, float, 2, 3, 4 and 8 bits: ResNet-18 70.5, 67.6, 70.2, 71.1, 71.1; ResNet-50 76.9, 73.7, 75.8,
76.7, 76.8. Not run here. Hardware: 8 GPUs of 80 GB, or a TPU v5e-8; by 2,500 (ResNet-18) and 1,200 (ResNet-50) images a
second on one A100, an assumption and no measurement, 90 epochs take 1.6 and 3.3 hours on eight.
python -m qat.run.train --config configs/imagenet_resnet.py:quantizer=float --workdir runs/r18 --config.data.data_dir=D
python -m qat.run.train --config configs/imagenet_resnet.py:bits=2,init_from=runs/r18 --workdir runs/r18_w2a2 \
    --config.data.data_dir=D
Most wanted: `:model=resnet50`, `:bits=3`, `:augment=strong` (RandAugment, mixup 0.2, CutMix 1.0, smoothing 0.1).
docs/data.md says how D is made.

Differences from the paper: blocks have their activation after the sum and not before; a step an output for weights, and
not a layer; crops of random area and aspect, in place of 224 of 256 pixels; steps do not decay.
"""

from configs import defaults

IMAGES, EPOCHS, BATCH = 1_281_167, 90, 256
WEIGHT_DECAY = {2: 0.25e-4, 3: 0.5e-4, 4: 1e-4, 8: 1e-4}  # Sec. 3.
PLAIN = (dict(name='random_resized_crop'), dict(name='flip'))


def get_config(arg=''):
  arg = defaults.parse_arg(arg, model='resnet18', quantizer='lsq', bits=4, init_from='', augment='plain', smoke=False)
  config = defaults.base()
  config.data.update(name='imagenet2012', test='validation', batch_size=BATCH)
  config.data.options.update(size=224, resize=256)
  config.data.train_options.update(augment=PLAIN, mixup=0.0, cutmix=0.0, smoothing=0.0)
  if arg.augment == 'strong':
    config.data.train_options.update(augment=(*PLAIN, dict(name='rand_augment', layers=2, magnitude=9)), mixup=0.2,
                                     cutmix=1.0, smoothing=0.1)
  config.model.update(name=f'resnet.{arg.model}', classes=1000)
  config.init_from = arg.init_from
  floats = arg.quantizer == 'float'
  if not floats:
    config.recipe = defaults.bits(arg.quantizer, arg.bits)
    config.recipe.rules = {'stem|head': defaults.bits(arg.quantizer, 8)}
  epochs, rate = (1, 1e-3) if arg.bits == 8 and not floats else (EPOCHS, 0.1 if floats else 0.01)
  config.objective = 'soft_classification'
  config.optimizer.update(name='sgd', learning_rate=rate, clip_norm=0.0,
                          weight_decay=1e-4 if floats else WEIGHT_DECAY.get(arg.bits, 1e-4))
  config.optimizer.options.momentum = 0.9
  config.total_steps = epochs * IMAGES // BATCH
  config.schedule.warmup_steps = 5 * IMAGES // BATCH if floats else 0  # Goyal et al. 2017, https://arxiv.org/abs/1706.02677
  config.eval.update(batch_size=BATCH, every_steps=5 * IMAGES // BATCH)
  config.checkpoint_every_steps = IMAGES // BATCH
  config.log_every_steps = 100
  if arg.smoke:
    config.data.options.update(size=32, resize=36)
    config.model.update(name='resnet.cifar', layers=8)
    defaults.smoke(config)
  return config
