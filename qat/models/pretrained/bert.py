"""BERT's encoder under Hugging Face's names: sentence-transformers' models and BERT itself.

https://huggingface.co/docs/transformers/model_doc/bert
"""

from flax import nnx

from qat.models import encoder
from qat.models.pretrained import family
from qat.models.pretrained import names


def _linear(theirs, ours):
  return [names.Name(f'{theirs}.weight', f'{ours}/kernel', names.transposed),
          names.Name(f'{theirs}.bias', f'{ours}/bias')]


def _norm(theirs, ours):
  return [names.Name(f'{theirs}.weight', f'{ours}/scale'), names.Name(f'{theirs}.bias', f'{ours}/bias')]


NAMES = [
    names.Name('embeddings.word_embeddings.weight', 'embed/embedding'),
    names.Name('embeddings.position_embeddings.weight', 'position/embedding'),
    names.Name('embeddings.token_type_embeddings.weight', 'type/embedding'),
    *_norm('embeddings.LayerNorm', 'norm'),
    *_linear('encoder.layer.{i}.attention.self.query', 'blocks/{i}/attention/q'),
    *_linear('encoder.layer.{i}.attention.self.key', 'blocks/{i}/attention/k'),
    *_linear('encoder.layer.{i}.attention.self.value', 'blocks/{i}/attention/v'),
    *_linear('encoder.layer.{i}.attention.output.dense', 'blocks/{i}/attention/o'),
    *_norm('encoder.layer.{i}.attention.output.LayerNorm', 'blocks/{i}/attention_norm'),
    *_linear('encoder.layer.{i}.intermediate.dense', 'blocks/{i}/ffn/up'),
    *_linear('encoder.layer.{i}.output.dense', 'blocks/{i}/ffn/down'),
    *_norm('encoder.layer.{i}.output.LayerNorm', 'blocks/{i}/ffn_norm'),
]
# Whole numbers 0, 1, ...; a layer on the first token, which `encoder.pool` does not read; the heads of BERT's training.
IGNORED = (r'embeddings\.position_ids', r'pooler\..*', r'cls\..*')


def config(settings):
  """The sizes of an encoder out of config.json (family.Settings)."""
  settings.require(hidden_act='gelu', position_embedding_type='absolute', is_decoder=False, add_cross_attention=False)
  return encoder.Config(
      vocab_size=settings.size('vocab_size'), context_length=settings.size('max_position_embeddings'),
      width=settings.size('hidden_size'), layers=settings.size('num_hidden_layers'),
      heads=settings.size('num_attention_heads'), ffn_width=settings.size('intermediate_size'),
      types=settings.size('type_vocab_size', 2), norm_epsilon=settings.number('layer_norm_eps', 1e-12))


BERT = family.Family(
    config, lambda config, dtype: encoder.Encoder(config, nnx.Rngs(0), dtype), NAMES, 'bert.', IGNORED)
