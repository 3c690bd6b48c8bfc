r"""Llama-2-7B fine-tuned by adapters of rank 64 beside NF4 with double quantization. https://arxiv.org/abs/2305.14314

QLoRA's settings for 7B: rank 64, alpha 16, dropout 0.1, 1,875 steps of 16 examples at 2e-4, on OASST1.
The papers' figures: MMLU, 5 shots, mean of LLaMA 7B to 65B: 53.1 with NF4 and double quantization, 53.0 in bfloat16;
on WikiText2 (`:data=wikitext,init=loftq`), Llama-2-7B after LoftQ: 5.24, in 16 bits 5.08
(https://arxiv.org/abs/2310.08659).
Not run here. Hardware: one GPU of 48 GB; the planner counts 26 GiB. The paper's 65B took 24 hours on one of 48 GB.
hf download meta-llama/Llama-2-7b-hf --local-dir M
python -m qat.run.finetune --config configs/llama2_7b_qlora.py --workdir runs/qlora --config.pretrained=M \
    --config.data.options.train=oasst1.jsonl --config.data.options.test=held_out.jsonl
qat finetune --plan --config configs/llama2_7b_qlora.py     prints the memory it takes, with no weights there.
`:data=file` reads chats ({"messages": [...]} a line); `:data=wikitext` needs --config.data.options.data_dir=D, which
docs/data.md makes. `:init=loftq`, `:base=` as in configs/smollm2_qlora.py.

Differences from the paper: the loss is that of answers alone; perplexity is of windows of 1,024 tokens.
"""

import ml_collections as mlc

from configs import defaults

BLOCKS = r'blocks/[\w/]+'


def get_config(arg=''):
  arg = defaults.parse_arg(arg, data='file', base='nf4_dq', init='gaussian', rank=64, steps=1875, smoke=False)
  config = defaults.finetune('llama2_7b')
  config.dtype = 'bfloat16'
  chats = arg.data == 'file'
  config.data.update(name=arg.data, length=1024, packing='rows_by_length' if chats else 'stream', separator='</s>',
                     batch_size=16)
  if chats:
    config.data.options.update(train='', test='')
  else:
    config.data.options.update(data_dir=mlc.config_dict.placeholder(str), variant='wikitext-2-raw-v1')
  if arg.base != 'float':
    config.recipe.update(name='float', rules={BLOCKS: arg.base})
  config.adapter.update(rules=(BLOCKS,), rank=arg.rank, alpha=16.0, dropout=0.1, init=arg.init)
  if arg.init == 'loftq':
    config.adapter.options.steps = 5
  config.remat = r'blocks/\d+'
  config.optimizer.accumulate_steps = 16
  config.total_steps = arg.steps
  config.schedule.warmup_steps = round(0.03 * arg.steps)
  config.eval.update(length=1024, sequences=64, batch_size=1, every_steps=max(arg.steps // 4, 1))
  if arg.smoke:
    config.data.update(length=32, batch_size=2)
    config.optimizer.accumulate_steps = 2
    config.total_steps, config.schedule.warmup_steps = 2, 0
    config.eval.update(length=32, sequences=2, every_steps=2)
    config.log_every_steps = config.checkpoint_every_steps = 1
  return config
