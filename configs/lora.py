r"""A float language model of characters that `qat train` left, fine-tuned by adapters beside its codes.

Trains on the King James Version, 16 x 128 characters a step; the loss is that of 256 x 128 characters of John. The
network below, seed 0: LoRA on floats goes from 1.777 to 1.414 nats in 200 steps, 20 s of 2 CPU cores. Results:
experiments/qlora.
python -m qat.run.train --config configs/shakespeare.py:recipe=float --workdir /tmp/llama \
    --config.model.name=decoder.llama --config.model.layers=2 --config.total_steps=800
python -m qat.run.finetune --config configs/lora.py:workdir=/tmp/llama,base=nf4_dq --workdir /tmp/llama_lora
`:base=`, `:adapter=`, `:init=`, `:rank=` as in configs/smollm2_qlora.py. What merging leaves is a network again, whose
codes take adapters as they are: after `qat merge --workdir /tmp/llama_lora --into grid`,
`:workdir=/tmp/llama_lora/merged/grid_gptq,base=float`.
"""

import re

from configs import defaults

BLOCKS = r'blocks/[\w/]+'


def get_config(arg=''):
  arg = defaults.parse_arg(arg, workdir='', base='nf4_dq', adapter='lora', init='gaussian', rank=16, steps=200,
                           smoke=False)
  config = defaults.finetune(arg.workdir)
  config.data.update(name='king_james', length=128, batch_size=16, separator='\n')
  if arg.base != 'float':
    config.recipe.update(name='float', rules={BLOCKS: arg.base})
  config.adapter.update(rules=() if arg.adapter == 'none' else (BLOCKS,), rank=arg.rank, alpha=float(arg.rank),
                        init=arg.init)
  if arg.init == 'loftq':
    config.adapter.options.steps = 5
  if arg.adapter == 'qalora':
    config.adapter.group = int(re.search(r'_g(\d+)', arg.base)[1])
  config.optimizer.learning_rate = 1e-2
  config.total_steps = arg.steps
  config.schedule.update(name='linear_schedule', end_value=0.0, warmup_steps=round(0.03 * arg.steps))
  config.eval.update(length=128, sequences=256, batch_size=64, every_steps=arg.steps)
  config.checkpoint_every_steps = arg.steps
  if arg.smoke:
    config.total_steps, config.schedule.warmup_steps = 2, 0
    config.eval.update(sequences=2, batch_size=2, every_steps=2)
    config.log_every_steps = config.checkpoint_every_steps = 1
  return config
