r"""SmolLM2-135M put on a grid without training: rounding to nearest, GPTQ, AWQ, learned rounding.

Perplexity on the first 4 x 512 tokens of the State of the Union of 2021, 16 x 512 of earlier ones for calibration. The
published file's weights are on a Q4_1 grid already: that is the "float" base, 22.27. Groups of 64, 4 and 3 bits: GPTQ
24.21 and 30.69 (1 minute on 2 cores), QuantEase 29.95 at 3, SignRound from there 27.54. See docs/results/smollm2/.
python -m qat.run.ptq --config configs/smollm2.py:method=gptq,bits=4,block=64 --workdir /tmp/smollm2
`:method=` takes rtn, gptq, quantease, awq, hqq, adaround, autoround, ...; `:inputs=` the bits of the layers' inputs, 16
for floats; `:rotate` rotates by Hadamard matrices first. Most wanted: --config.method.<option>.
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, method='gptq', bits=4, block=64, inputs=16, rotate=False, smoke=False)
  config = defaults.ptq('language_model', 'smollm2')
  config.calibration.update(sequences=16, length=512, batch_size=4)
  config.transforms = (dict(name='rotate'),) if arg.rotate else ()
  config.recipe.update(name='float', rules={r'blocks/[\w/]+': f'w{arg.bits}a{arg.inputs}_g{arg.block}'})
  config.method = defaults.method(arg.method)
  config.eval.update(sequences=4, length=512)
  if arg.smoke:
    config.calibration.update(sequences=2, length=16, batch_size=2)
    config.eval.update(sequences=1, length=32)
  return config
