"""Tiny folders in Hugging Face's layout, with random weights under their real names."""

import json

import numpy as np
from safetensors.numpy import save_file

WIDTH, HEADS, KV, HEAD_DIM, FFN, VOCAB, LAYERS, CONTEXT = 16, 4, 2, 8, 24, 13, 2, 32

LLAMA = dict(
    model_type='llama', vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5, rope_theta=500.0, hidden_act='silu', tie_word_embeddings=False)
QWEN2 = LLAMA | dict(model_type='qwen2', use_sliding_window=False, sliding_window=128)
QWEN3 = LLAMA | dict(model_type='qwen3', tie_word_embeddings=True)
GEMMA = LLAMA | dict(model_type='gemma', hidden_act='gelu', hidden_activation='gelu_pytorch_tanh')
del GEMMA['tie_word_embeddings']  # as in the files of Google, where the default holds
GPT2 = dict(
    model_type='gpt2', vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, n_inner=None,
    layer_norm_epsilon=1e-5, activation_function='gelu_new')


def shapes(config):
  """The tensors that the transformers package saves for a config: {name: shape}."""
  if config['model_type'] == 'gpt2':
    layer = {
        'ln_1.weight': (WIDTH,), 'ln_1.bias': (WIDTH,), 'ln_2.weight': (WIDTH,), 'ln_2.bias': (WIDTH,),
        'attn.c_attn.weight': (WIDTH, 3 * WIDTH), 'attn.c_attn.bias': (3 * WIDTH,),
        'attn.c_proj.weight': (WIDTH, WIDTH), 'attn.c_proj.bias': (WIDTH,),
        'mlp.c_fc.weight': (WIDTH, 4 * WIDTH), 'mlp.c_fc.bias': (4 * WIDTH,),
        'mlp.c_proj.weight': (4 * WIDTH, WIDTH), 'mlp.c_proj.bias': (WIDTH,)}
    return {f'transformer.h.{i}.{name}': shape for i in range(LAYERS) for name, shape in layer.items()} | {
        'transformer.wte.weight': (VOCAB, WIDTH), 'transformer.wpe.weight': (CONTEXT, WIDTH),
        'transformer.ln_f.weight': (WIDTH,), 'transformer.ln_f.bias': (WIDTH,)}
  q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
  layer = {
      'input_layernorm.weight': (WIDTH,), 'post_attention_layernorm.weight': (WIDTH,),
      'self_attn.q_proj.weight': (q, WIDTH), 'self_attn.k_proj.weight': (kv, WIDTH),
      'self_attn.v_proj.weight': (kv, WIDTH), 'self_attn.o_proj.weight': (WIDTH, q),
      'mlp.gate_proj.weight': (FFN, WIDTH), 'mlp.up_proj.weight': (FFN, WIDTH), 'mlp.down_proj.weight': (WIDTH, FFN)}
  if config['model_type'] == 'qwen2':
    layer |= {'self_attn.q_proj.bias': (q,), 'self_attn.k_proj.bias': (kv,), 'self_attn.v_proj.bias': (kv,)}
  if config['model_type'] == 'qwen3':
    layer |= {'self_attn.q_norm.weight': (HEAD_DIM,), 'self_attn.k_norm.weight': (HEAD_DIM,)}
  tied = config.get('tie_word_embeddings', config['model_type'] == 'gemma')
  head = {} if tied else {'lm_head.weight': (VOCAB, WIDTH)}
  return {f'model.layers.{i}.{name}': shape for i in range(LAYERS) for name, shape in layer.items()} | head | {
      'model.embed_tokens.weight': (VOCAB, WIDTH), 'model.norm.weight': (WIDTH,)}


def tensors(config, dtype=np.float32):
  """Random weights of a size at which every part of the network matters."""
  rng = np.random.default_rng(0)
  return {name: (rng.normal(size=shape) * 0.4 + (len(shape) == 1 and 'norm' in name) * 0.8).astype(dtype)
          for name, shape in shapes(config).items()}


def write(folder, config, weights, shards=1):
  """Writes config.json and the weights, in one file or in several with their index."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  if shards == 1:
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder
  places = {name: f'model-{i % shards + 1:05}-of-{shards:05}.safetensors' for i, name in enumerate(weights)}
  for file in set(places.values()):
    save_file({name: x for name, x in weights.items() if places[name] == file}, folder / file)
  size = sum(x.nbytes for x in weights.values())
  (folder / 'model.safetensors.index.json').write_text(json.dumps(
      dict(metadata=dict(total_size=size), weight_map=places)))
  return folder
