r"""A float network that `qat train` left, put on a grid without training it further.

The MLP of configs/digits.py, one seed, 2-bit weights with a scale an output: float 98.0 %, nearest 94.0, GPTQ 95.4,
AdaRound 95.6.

python -m qat.run.train --config configs/digits.py:quantizer=float --workdir /tmp/digits
python -m qat.run.ptq --config configs/ptq.py:workdir=/tmp/digits,method=adaround,recipe=w2a16 --workdir /tmp/digits_w2
`:method=` rtn, gptq, adaround, ...; `:recipe=` any name of qat/nn/recipes.py.
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, workdir='', method='gptq', recipe='w4a16', examples=256, smoke=False)
  config = defaults.ptq('trained', arg.workdir)
  config.calibration.update(examples=arg.examples, batch_size=32)
  config.recipe.name = arg.recipe
  config.method = defaults.method(arg.method)
  if arg.smoke:
    config.calibration.update(examples=32)
  return config
