r"""BitNet b1.58 of 700 M parameters from scratch: ternary weights, 8-bit inputs. https://arxiv.org/abs/2402.17764

The paper's perplexity: 12.87, for 12.33 of LLaMA in floats at the same size. Not run here. Hardware: 64 A100 of 80 GB
or a TPU v5p-64; by 6 x 0.7e9 x 100e9 = 4.2e20 operations at 40 % of 312e12 a second, an assumption and no measurement,
100 billion tokens take 940 A100 hours.
python -m qat.run.train --config configs/bitnet_700m.py:data=c4 --workdir runs/bitnet --config.data.data_dir=D \
    --config.data.options.tokenizer=T --config.mesh.fsdp=8
`qat train --plan` counts 35 GiB of activations a sequence, all of which are kept: one a device at a time on eight.
`:recipe=float` is the baseline at the paper's rate for it, `:data=wikitext` another corpus. docs/data.md says how D is
made; T is a tokenizer.json of 32,000 tokens, such as Llama 2's.

Differences from the paper: C4 in place of RedPajama; the embedding, in floats as there, is the head; no norm of its own
before each projection.
"""

from configs import defaults

TOKENS, LENGTH, BATCH = 100e9, 2048, 512  # A batch of 2^20 tokens.
RATES = dict(float=2.5e-4)                # 1.5e-3 for ternary weights.


def get_config(arg=''):
  arg = defaults.parse_arg(arg, data='c4', recipe='bitnet', smoke=False)
  config = defaults.base()
  config.data.update(name=arg.data, test='validation', batch_size=BATCH)
  config.data.options.update(tokenizer='', separator='</s>', length=LENGTH, files=1)
  config.data.train_options.files = 0
  config.model.update(name='decoder.llama', vocab_size=32000, context_length=LENGTH, width=1536, layers=24, heads=24,
                      ffn_width=4096, dtype='bfloat16')
  if arg.recipe != 'float':
    config.recipe = dict(name=arg.recipe, rules={'embed': 'float'})
  config.objective = 'next_token'
  config.optimizer.update(name='adamw', learning_rate=RATES.get(arg.recipe, 1.5e-3), weight_decay=0.1,
                          accumulate_steps=64)
  config.optimizer.options.b2 = 0.95
  config.schedule.update(name='linear_schedule', end_value=0.0, warmup_steps=375)
  if arg.recipe == 'bitnet':  # Rates of 1.5e-3 and then 1e-3.
    config.schedule = dict(name='two_stage_linear', warmup_steps=375)
    config.optimizer.weight_decay_until = 0.5
  config.total_steps = int(TOKENS / (BATCH * LENGTH))
  config.eval.update(batch_size=8, every_steps=1000)
  config.checkpoint_every_steps = 1000
  if arg.smoke:
    config.data.options.length = 32
    config.model.update(context_length=32, width=64, layers=1, heads=2, ffn_width=64)
    config.optimizer.accumulate_steps = 1
    defaults.smoke(config)
    config.data.test = 'validation'  # Documents may be few: all of them.
  return config
