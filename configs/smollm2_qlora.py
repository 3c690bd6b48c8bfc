r"""SmolLM2-135M fine-tuned by adapters beside its codes. QLoRA: https://arxiv.org/abs/2305.14314

Trains on the addresses on the State of the Union of 1945 to 2020, a sequence of 512 tokens a step; the loss is that of
the first 4 x 512 tokens of the address of 2021. NF4 with double quantization takes 4.127 bits a weight. In 120 steps it
goes from 3.296 to 2.971 nats, LoRA on the floats, which are on a Q4_1 grid, from 3.103 to 2.896, one seed; the rate was
chosen by that text, from 40 steps at 1e-3 and 2e-3. A step takes 5 s of computation on 2 CPU cores.
python -m qat.run.finetune --config configs/smollm2_qlora.py --workdir /tmp/qlora
`:base=` takes nf4_dq, nf4, nf3, nf2, fp4_bnb, mxfp4, w8a16, any w<bits>a16_g<group>, or float; `:init=` gaussian,
kaiming, loftq, pissa; `:adapter=` lora, rslora, dora, qalora (in the groups of a w<bits>a16_g<group> base), or none,
which trains all floats; `:lora_plus=16` B's rate over A's.
"""

import re

from configs import defaults

BLOCKS = r'blocks/[\w/]+'


def get_config(arg=''):
  arg = defaults.parse_arg(arg, base='nf4_dq', adapter='lora', init='gaussian', rank=16, lora_plus=1.0, steps=120,
                           smoke=False)
  config = defaults.finetune('smollm2')
  config.data.update(name='union', length=512, batch_size=1)
  config.data.options.update(first_year=1945, last_year=2020)
  if arg.base != 'float':
    config.recipe.update(name='float', rules={BLOCKS: arg.base})
  config.adapter.update(rules=() if arg.adapter == 'none' else (BLOCKS,), rank=arg.rank, alpha=float(arg.rank),
                        init=arg.init)
  if arg.init == 'loftq':
    config.adapter.options.steps = 5
  if arg.adapter == 'rslora':
    config.adapter.scaling = 'by_root_of_rank'
  if arg.adapter == 'qalora':
    config.adapter.group = int(re.search(r'_g(\d+)', arg.base)[1])
  config.adapter.dora = arg.adapter == 'dora'
  config.optimizer.learning_rate = 2e-3
  if arg.lora_plus != 1:
    config.optimizer.groups = ((r'.*/B', dict(learning_rate_scale=arg.lora_plus)),)
  config.total_steps = arg.steps
  config.schedule.update(name='linear_schedule', end_value=0.0, warmup_steps=round(0.03 * arg.steps))
  config.eval.update(length=512, sequences=4, batch_size=1, every_steps=arg.steps // 4)
  config.checkpoint_every_steps = 20
  if arg.smoke:
    config.data.update(length=32)
    config.data.options.update(first_year=2019)
    config.total_steps, config.schedule.warmup_steps = 2, 0
    config.eval.update(length=32, sequences=2, every_steps=2)
    config.log_every_steps = config.checkpoint_every_steps = 1
  return config
