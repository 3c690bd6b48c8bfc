r"""Llama-2-7B put on a grid without training: GPTQ, AWQ, QuaRot, OmniQuant, EfficientQAT, by their papers' settings.

Perplexity on the test set of WikiText2 in windows of 2,048 tokens, calibrated on 128 x 2,048 tokens of C4. The papers'
figures, in floats 5.47:

    W3 g128       nearest 6.66, GPTQ 6.43, AWQ 6.24, EfficientQAT 5.81     https://arxiv.org/abs/2306.00978, 2407.11062
    W4 g128       nearest 5.73, OmniQuant 5.58, EfficientQAT 5.53          https://arxiv.org/abs/2308.13137
    W2 g128, g64  OmniQuant 11.06, EfficientQAT 7.19 (g64: 6.86)
    W4A4          QuaRot and GPTQ 6.10, g128 5.93, with keys and values in 4 bits     https://arxiv.org/abs/2404.00456

Not run here. Hardware: one GPU of 80 GB, and 64 GB of memory. The papers say, of one A100: GPTQ took about 4 hours for
175B parameters, OmniQuant 1 to 16 for 7B to 70B, EfficientQAT 41 for 70B in both phases.
hf download meta-llama/Llama-2-7b-hf --local-dir M
python -m qat.run.ptq --config configs/llama2_7b.py:method=gptq,bits=3,block=128 --workdir runs/gptq \
    --config.pretrained=M --config.calibration.data_dir=D --config.eval.data_dir=D
`:method=` rtn, gptq, awq, omniquant, efficientqat (both phases), quarot (rotated, then GPTQ: `inputs=4,kv=4,block=0`);
`:kv=4` puts keys and values in 4 bits; `:block=0` is a scale an output; `:asym=false` leaves zeros out. docs/data.md
says how D is made.

Differences from the papers: AWQ's own calibration is on the Pile, QuaRot's on WikiText2, EfficientQAT's on 4,096 x
2,048 tokens of RedPajama, where its second phase sees labels, here the float network's outputs.
"""

import ml_collections as mlc

from configs import defaults

BLOCKS = r'blocks/[\w/]+'
# Method of the paper -> (method of qat/ptq/named.py, transform).
PAPERS = dict(quarot=('gptq', 'rotate'), efficientqat=('efficientqat', 'scales'))
# What a paper has otherwise than the method's default here.
OPTIONS = dict(omniquant=dict(steps=20 * 128 // 4), efficientqat=dict(steps=2 * 128 // 2))


def get_config(arg=''):
  settings = dict(method='gptq', bits=4, block=128, inputs=16, kv=16, asym=True, smoke=False)
  settings['asym'] = defaults.parse_arg(arg, **settings).inputs == 16  # Inputs of few bits meet symmetric weights.
  arg = defaults.parse_arg(arg, **settings)
  config = defaults.ptq('corpora', 'llama2_7b')
  method, transform = PAPERS.get(arg.method, (arg.method, ''))
  data_dir = mlc.config_dict.placeholder(str)
  config.calibration.update(name='c4', variant='en', split='train', data_dir=data_dir, files=1, sequences=128,
                            length=2048, batch_size=2)
  config.transforms = defaults.transforms(method, transform)
  if transform == 'scales':
    rate = 2e-5 if arg.bits == 2 else 1e-5
    config.transforms = (dict(name='scales', steps=2 if arg.smoke else 128, rate=rate),)
  held = f'_kv{arg.kv}' if arg.kv != 16 else ''
  grid = f'w{arg.bits}a{arg.inputs}{f"_g{arg.block}" * bool(arg.block)}{"_asym" * arg.asym}{held}'
  config.recipe.update(name='float', rules={BLOCKS: grid})
  config.method = defaults.method(method, arg.smoke)
  config.method.update({name: value for name, value in OPTIONS.get(method, {}).items() if not arg.smoke})
  config.eval.update(name='wikitext', variant='wikitext-2-raw-v1', split='test', data_dir=data_dir, files=0,
                     sequences=0, length=2048)  # 0: all of the split.
  if arg.smoke:
    config.calibration.update(sequences=4, length=16, batch_size=2)
    config.eval.update(sequences=2, length=16)
  return config
