"""The config of the tests of `qat finetune`, and the small published network that they fine-tune."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from configs import defaults
from tests.models.pretrained import hf

TEXT = 'It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. '
WIDTH, FFN, CONTEXT = 64, 128, 128
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


def get_config(arg=''):
  arg = defaults.parse_arg(arg, folder='', train='', test='', base='nf4_dq', init='gaussian', rank=4, rules='blocks/.*',
                           dropout=0.0, steps=6, packing='stream', length=32)
  config = defaults.finetune(arg.folder)
  config.data.update(name='file', length=arg.length, packing=arg.packing, batch_size=4)
  config.data.options.update(train=arg.train, test=arg.test or arg.train)
  if arg.base != 'float':
    config.recipe.update(name='float', rules={r'blocks/[\w/]+': arg.base})
  config.adapter.update(rules=(arg.rules,) if arg.rules else (), rank=arg.rank, init=arg.init, dropout=arg.dropout)
  config.optimizer.learning_rate = 1e-2
  config.total_steps = arg.steps
  config.eval.update(length=32, sequences=4, batch_size=2, every_steps=arg.steps)
  config.log_every_steps = 1
  config.log_every_seconds = 60
  config.checkpoint_every_steps = 2
  return config


def tokenizer():
  """A token a byte, and three special ones."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(list(SPECIAL))
  return made


def network(folder, layers=2, seed=0):
  """Writes a small Llama with a tokenizer of bytes and a chat template; returns its folder."""
  vocab = tokenizer().get_vocab_size()
  config = dict(hf.LLAMA, vocab_size=vocab, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=layers,
                head_dim=16, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
  rng, kv = np.random.default_rng(seed), 2 * 16
  shapes = {'self_attn.q_proj': (WIDTH, WIDTH), 'self_attn.k_proj': (kv, WIDTH), 'self_attn.v_proj': (kv, WIDTH),
            'self_attn.o_proj': (WIDTH, WIDTH), 'mlp.gate_proj': (FFN, WIDTH), 'mlp.up_proj': (FFN, WIDTH),
            'mlp.down_proj': (WIDTH, FFN)}
  normal = lambda shape: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
  ones = np.ones(WIDTH, np.float32)
  tensors = {'model.embed_tokens.weight': normal((vocab, WIDTH)), 'model.norm.weight': ones}
  for i in range(layers):
    tensors |= {f'model.layers.{i}.{name}.weight': normal(shape) for name, shape in shapes.items()}
    tensors |= {f'model.layers.{i}.{name}.weight': ones for name in ('input_layernorm', 'post_attention_layernorm')}
  hf.write(folder, config, tensors)
  tokenizer().save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(
      dict(chat_template=TEMPLATE, eos_token=dict(content='<|im_end|>'), bos_token=None)))
  return folder
