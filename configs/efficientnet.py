r"""EfficientNet-Lite0 in low bits without training, on photos that come in packages; its BatchNorms are folded.

Agreement with the float network on photos without labels; 20 labelled photos resolve 5 points only. At 4 bits, a scale
an output: 14.0 % by rounding to nearest, 56.0 % by GPTQ, 92.0 % by AdaRound in 300 steps a block (26 minutes on 2 busy
cores). See docs/results/efficientnet/.
python -m qat.run.ptq --config configs/efficientnet.py:method=adaround,recipe=w4a16 --workdir /tmp/efficientnet
`:method=` rtn, gptq, adaround, ...; `:recipe=` any name of qat/nn/recipes.py; `:transform=` one of
qat/run/transforms.py, such as equalize or bias_correction.
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, method='adaround', recipe='w4a16', transform='', images=128, smoke=False)
  config = defaults.ptq('photographs', 'efficientnet_lite0')
  config.calibration.update(images=arg.images, batch_size=32)
  config.transforms = defaults.transforms(arg.method, arg.transform)
  config.recipe.name = arg.recipe
  config.method = defaults.method(arg.method, arg.smoke)
  if 'steps' in config.method and not arg.smoke:
    config.method.steps = 300
  config.eval.update(images=200, batch_size=20)
  if arg.smoke:
    config.calibration.update(images=2, batch_size=2)
    config.eval.update(images=4, batch_size=4)
  return config
