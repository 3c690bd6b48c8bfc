r"""SmolLM2-135M put on a grid without training: rounding to nearest, GPTQ, AWQ, learned rounding.

Perplexity on the first 4 x 512 tokens of the State of the Union of 2021, 16 x 512 of earlier ones for calibration. The
published file's weights are on a Q4_1 grid already: that is the "float" base, 22.27. GPTQ at 3 bits in groups of 64
gives 28.79 (29.59 with --config.method.sequential=True), AdaRound from QuantEase 26.86. See docs/results/smollm2/.
python -m qat.run.ptq --config configs/smollm2.py:method=gptq,bits=4,block=64 --workdir /tmp/smollm2
`:method=` takes rtn, gptq, quantease, awq, hqq, adaround, autoround, ...; `:inputs=` the bits of the layers' inputs, 16
for floats; `:transform=` one of qat/run/transforms.py. `:asym` gives unsigned weights a zero in float32 for each scale,
half a bit a weight more in groups of 64: only hqq, which solves for zeros, has it unless told `asym=false`.
Most wanted: --config.method.<option>, --config.search.candidates.
"""

from configs import defaults


def get_config(arg=''):
  settings = dict(method='gptq', bits=4, block=64, inputs=16, asym=False, transform='', smoke=False)
  settings['asym'] = defaults.parse_arg(arg, **settings).method == 'hqq'
  arg = defaults.parse_arg(arg, **settings)
  config = defaults.ptq('language_model', 'smollm2')
  config.calibration.update(sequences=16, length=512, batch_size=4)
  config.transforms = defaults.transforms(arg.method, arg.transform)
  config.recipe.update(name='float', rules={
      r'blocks/[\w/]+': f'w{arg.bits}a{arg.inputs}_g{arg.block}{"_asym" * arg.asym}'})
  config.method = defaults.method(arg.method, arg.smoke)
  config.eval.update(sequences=4, length=512)
  if arg.smoke:
    config.calibration.update(sequences=2, length=16, batch_size=2)
    config.eval.update(sequences=1, length=32)
  return config
