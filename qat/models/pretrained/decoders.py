"""Decoders in Hugging Face's layout: Llama, Qwen2, Qwen3, Gemma and GPT-2 as qat.models.decoder.

Names and settings are those of https://github.com/huggingface/transformers, in src/transformers/models/<family>. Its
linear layers store [out, in] and GPT-2's Conv1D [in, out]; rotary positions pair the halves of a head.

Differences: computed in float32, Gemma's embeddings are multiplied by sqrt(width) as it is; the weights' own dtype,
bfloat16, would round it. Gemma 2 and 3 are other networks (norms after the layers, soft caps, windows) and are not
read.
"""

from flax import nnx

from qat.models import decoder
from qat.models import rope
from qat.models.pretrained.family import Family
from qat.models.pretrained.names import Name, part, plus_one, transposed, unchanged


def _llama_table(norm):
  """Names of Llama and its kin, with what becomes of a norm's scale."""
  layer, block = 'layers.{i}', 'blocks/{i}'
  return [
      Name('embed_tokens.weight', 'embed/embedding'),
      Name('norm.weight', 'norm/scale', norm),
      Name('lm_head.weight', 'head/kernel', transposed),
      Name(f'{layer}.input_layernorm.weight', f'{block}/attention_norm/scale', norm),
      Name(f'{layer}.post_attention_layernorm.weight', f'{block}/ffn_norm/scale', norm),
      *(Name(f'{layer}.self_attn.{x}_proj.weight', f'{block}/attention/{x}/kernel', transposed) for x in 'qkvo'),
      *(Name(f'{layer}.self_attn.{x}_proj.bias', f'{block}/attention/{x}/bias') for x in 'qkvo'),
      *(Name(f'{layer}.self_attn.{x}_norm.weight', f'{block}/attention/{x}_norm/scale', norm) for x in 'qk'),
      *(Name(f'{layer}.mlp.{x}_proj.weight', f'{block}/ffn/{x}/kernel', transposed) for x in ('gate', 'up', 'down')),
      *(Name(f'{layer}.mlp.{x}_proj.bias', f'{block}/ffn/{x}/bias') for x in ('gate', 'up', 'down')),
  ]


def _gpt2_table():
  """Names of GPT-2, whose queries, keys and values are one tensor."""
  layer, block = 'h.{i}', 'blocks/{i}'
  rows = [
      Name('wte.weight', 'embed/embedding'),
      Name('wpe.weight', 'position/embedding'),
      Name('lm_head.weight', 'head/kernel', transposed),
  ]
  for theirs, ours in [
      ('ln_f', 'norm'), (f'{layer}.ln_1', f'{block}/attention_norm'), (f'{layer}.ln_2', f'{block}/ffn_norm')]:
    rows += [Name(f'{theirs}.weight', f'{ours}/scale'), Name(f'{theirs}.bias', f'{ours}/bias')]
  for theirs, ours, change in [
      *(('attn.c_attn', f'attention/{x}', part(i, 3)) for i, x in enumerate('qkv')),
      ('attn.c_proj', 'attention/o', unchanged), ('mlp.c_fc', 'ffn/up', unchanged),
      ('mlp.c_proj', 'ffn/down', unchanged)]:
    rows += [Name(f'{layer}.{theirs}.weight', f'{block}/{ours}/kernel', change),
             Name(f'{layer}.{theirs}.bias', f'{block}/{ours}/bias', change)]
  return rows


def _llama_form(settings, **form):
  """The decoder.Config of Llama's settings; `form` is what the family has otherwise."""
  width, heads = settings.size('hidden_size'), settings.size('num_attention_heads')
  head_dim = settings.size('head_dim', width // heads)
  settings.require(partial_rotary_factor=1.0)
  return decoder.Config(**(decoder.LLAMA | dict(
      vocab_size=settings.size('vocab_size'), context_length=settings.size('max_position_embeddings'), width=width,
      layers=settings.size('num_hidden_layers'), heads=heads, kv_heads=settings.size('num_key_value_heads', heads),
      head_dim=head_dim, ffn_width=settings.size('intermediate_size'), norm_epsilon=settings.number('rms_norm_eps'),
      rope=_rope(settings, head_dim), tied_head=settings.get('tie_word_embeddings', False)) | form))


def _rope(settings, head_dim):
  """How positions turn, from the keys of old files (rope_theta, rope_scaling) or of new ones (rope_parameters)."""
  scaling = settings.get('rope_parameters') or settings.get('rope_scaling', {})
  if not isinstance(scaling, dict):
    raise ValueError(f'{settings.where}: rope_scaling is {scaling!r}, and should be an object. Get the file anew.')
  base = scaling.get('rope_theta') or settings.number('rope_theta', 10000.0)
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  try:
    if kind == 'default':
      divisors = 1.0
    elif kind == 'linear':
      divisors = scaling['factor']
    elif kind == 'llama3':
      divisors = rope.llama3_divisors(
          base, head_dim, scaling['factor'], scaling['low_freq_factor'], scaling['high_freq_factor'],
          scaling['original_max_position_embeddings'])
    else:
      raise ValueError(f'{settings.where}: rotary positions are scaled by {kind!r}; the kinds known are default, '
                       'linear and llama3. Take a checkpoint without it.')
  except KeyError as error:
    raise ValueError(f'{settings.where}: rotary positions scaled by {kind!r} need {error}, and there is {scaling}. '
                     'Get the file anew.') from None
  return rope.Rope(base, rope.halves, divisors)


def _llama(settings):
  """Llama: https://arxiv.org/abs/2302.13971"""
  bias = settings.get('mlp_bias', False)
  settings.require(hidden_act='silu')
  if settings.get('attention_bias', False) != bias:
    raise ValueError(f'{settings.where}: attention_bias is {not bias}, and mlp_bias is {bias}; here all layers have '
                     'biases, or none has. Take another checkpoint.')
  return _llama_form(settings, use_bias=bias)


def _qwen2(settings):
  """Qwen2: biases of queries, keys and values. https://arxiv.org/abs/2407.10671"""
  settings.require(hidden_act='silu', use_sliding_window=False)
  return _llama_form(settings, qkv_bias=True)


def _qwen3(settings):
  """Qwen3: norms of queries and keys. https://arxiv.org/abs/2505.09388"""
  settings.require(hidden_act='silu', use_sliding_window=False, attention_bias=False)
  return _llama_form(settings, qk_norm=nnx.RMSNorm)


def _gemma(settings):
  """Gemma: GeGLU, and embeddings multiplied by sqrt(width). https://arxiv.org/abs/2403.08295"""
  # hidden_act is 'gelu' in the first files, which were nevertheless trained with the tanh form.
  settings.require(hidden_activation='gelu_pytorch_tanh', attention_bias=False)
  return _llama_form(
      settings, ffn=decoder.GeGLU, embed_scale=settings.size('hidden_size') ** 0.5,
      tied_head=settings.get('tie_word_embeddings', True))


def _gpt2(settings):
  """GPT-2: https://github.com/openai/gpt-2"""
  settings.require(activation_function='gelu_new', scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                   add_cross_attention=False)
  width, heads = settings.size('n_embd'), settings.size('n_head')
  if width % heads:
    raise ValueError(f'{settings.where}: n_head {heads} does not divide n_embd {width}. Get the file anew.')
  return decoder.Config(**(decoder.GPT | dict(
      vocab_size=settings.size('vocab_size'), context_length=settings.size('n_positions'), width=width,
      layers=settings.size('n_layer'), heads=heads, kv_heads=heads, head_dim=width // heads,
      ffn_width=settings.size('n_inner', 4 * width), norm_epsilon=settings.number('layer_norm_epsilon'),
      tied_head=settings.get('tie_word_embeddings', True))))


def _model(config, dtype):
  return decoder.Decoder(config, nnx.Rngs(0), dtype)


# A tied head is in some files a second time; rotary angles and causal masks were once stored.
_LLAMA_IGNORED = (r'lm_head\.weight', r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
LLAMA, QWEN2, QWEN3 = (
    Family(make_config, _model, _llama_table(unchanged), 'model.', _LLAMA_IGNORED)
    for make_config in (_llama, _qwen2, _qwen3))
GEMMA = Family(_gemma, _model, _llama_table(plus_one), 'model.', _LLAMA_IGNORED)
GPT2 = Family(
    _gpt2, _model, _gpt2_table(), 'transformer.', (r'lm_head\.weight', r'h\.\d+\.attn\.(bias|masked_bias)'))
