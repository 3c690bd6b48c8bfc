r"""A GPT of a million parameters on Shakespeare's characters: float, W8A8, W4A8, W4 g64, MXFP4, NVFP4, BitNet b1.58.

Test bits per character, seed 0, embedding (the head) and positions at 8 bits: float 2.285, W8A8 2.288, W4A8 in groups
of 32 2.290, W4 g64 2.305, NVFP4 2.334, MXFP4 2.363, BitNet b1.58 2.415; W4A8 with a scale an output everywhere 2.323.
5 to 15 minutes each on 2 CPU cores. Results: docs/results/shakespeare_*.json.
python -m qat.run.train --config configs/shakespeare.py:recipe=w4a8_g32 --workdir /tmp/shakespeare
`:recipe=` takes float, or a name of qat/nn/recipes.py: w8a8, w4a8, w4a8_g32, w4a16_g64, mxfp4, nvfp4, bitnet, ...;
`:ends=` another, for the embedding (which is the head) and the positions; `:stages` is BitNet's schedule, of two lines
and no weight decay from the middle on.
"""

from configs import defaults


def get_config(arg=''):
  arg = defaults.parse_arg(arg, recipe='w4a8_g32', ends='w8a8', stages=False, smoke=False)
  config = defaults.base()
  config.data.update(name='shakespeare', batch_size=16)
  config.data.options.context_length = 128
  config.data.train_options.stride = 1
  config.model.update(name='decoder.gpt', vocab_size=65, context_length=128, width=128, layers=5, heads=4)
  if arg.recipe != 'float':
    config.recipe = dict(name=arg.recipe, rules={'embed|position': arg.ends})  # The tied head is an end too.
  config.objective = 'language'
  config.optimizer.update(name='adamw', learning_rate=2e-3, weight_decay=0.1)
  config.optimizer.options.b2 = 0.99
  config.schedule.warmup_steps = 100
  if arg.stages:
    config.schedule.name = 'two_stage_linear'
    config.optimizer.weight_decay_until = 0.5
  config.total_steps = 2000
  config.eval.update(batch_size=64, every_steps=500)
  config.checkpoint_every_steps = 500
  if arg.smoke:
    config.data.options.context_length = 32
    config.model.update(context_length=32, width=64, layers=1, heads=2)
    defaults.smoke(config)
  return config
