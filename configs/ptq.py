r"""A float network that `qat train` left, put on a grid without training it further.

The MLP of configs/digits.py, one seed, 2-bit weights with a scale an output: float 98.0 %, nearest 94.0, GPTQ 95.4,
AdaRound 96.8.

python -m qat.run.train --config configs/digits.py:quantizer=float --workdir /tmp/digits
python -m qat.run.ptq --config configs/ptq.py:workdir=/tmp/digits,method=adaround,recipe=w2a16 --workdir /tmp/digits_w2
`:method=` rtn, gptq, adaround, ...; `:recipe=` any name of qat/nn/recipes.py; `:layers=` a pattern for whole paths of
those to quantize; `:transform=` one of qat/run/transforms.py, before.
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, workdir='', method='gptq', recipe='w4a16', layers='.*', transform='', examples=256,
                           smoke=False)
  config = defaults.ptq('trained', arg.workdir)
  config.calibration.update(examples=arg.examples, batch_size=32)
  config.transforms = defaults.transforms(arg.method, arg.transform)
  if arg.layers == '.*':
    config.recipe.name = arg.recipe
  else:
    config.recipe.update(name='float', rules={arg.layers: arg.recipe})
  config.method = defaults.method(arg.method, arg.smoke)
  if arg.smoke:
    config.calibration.update(examples=32)
  return config
