import json

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from qat.models import encoder
from qat.models.pretrained import bert, folder
from tests.models import test_encoder

CONFIG = dict(model_type='bert', vocab_size=11, max_position_embeddings=8, hidden_size=8, num_hidden_layers=2,
              num_attention_heads=2, intermediate_size=20, type_vocab_size=2, layer_norm_eps=1e-12, hidden_act='gelu',
              position_embedding_type='absolute', gradient_checkpointing=False)
LAYERS = {'attention.self.query': 'attention/q', 'attention.self.key': 'attention/k', 'attention.self.value':
          'attention/v', 'attention.output.dense': 'attention/o', 'intermediate.dense': 'ffn/up', 'output.dense':
          'ffn/down'}
NORMS = {'attention.output.LayerNorm': 'attention_norm', 'output.LayerNorm': 'ffn_norm'}


def tensors(model, prefix=''):
  """The tensors of a Hugging Face file, [out, in], from a model of ours."""
  pure = {'/'.join(map(str, path)): np.asarray(p) for path, p in nnx.to_flat_state(nnx.state(model))}
  out = {f'embeddings.{theirs}.weight': pure[f'{ours}/embedding'] for theirs, ours in [
      ('word_embeddings', 'embed'), ('position_embeddings', 'position'), ('token_type_embeddings', 'type')]}
  norms = {'embeddings.LayerNorm': 'norm'}
  for i in range(2):
    norms |= {f'encoder.layer.{i}.{theirs}': f'blocks/{i}/{ours}' for theirs, ours in NORMS.items()}
    for theirs, ours in LAYERS.items():
      out[f'encoder.layer.{i}.{theirs}.weight'] = np.ascontiguousarray(pure[f'blocks/{i}/{ours}/kernel'].T)
      out[f'encoder.layer.{i}.{theirs}.bias'] = pure[f'blocks/{i}/{ours}/bias']
  for theirs, ours in norms.items():
    out |= {f'{theirs}.weight': pure[f'{ours}/scale'], f'{theirs}.bias': pure[f'{ours}/bias']}
  return {prefix + name: array for name, array in out.items()}


def write(path, arrays, **changes):
  safetensors.save_file(arrays, path / 'model.safetensors')
  (path / 'config.json').write_text(json.dumps(CONFIG | changes))
  return folder.Folder(path)


@pytest.fixture(scope='module')
def model():
  return test_encoder.build()


@pytest.mark.parametrize('prefix', ['', 'bert.'])
def test_reads_what_hugging_face_writes(tmp_path, model, prefix):
  arrays = tensors(model, prefix) | {
      f'{prefix}embeddings.position_ids': np.arange(8)[None],
      f'{prefix}pooler.dense.weight': np.ones((8, 8), np.float32),
      'cls.predictions.bias': np.ones(11, np.float32)}
  read = write(tmp_path, arrays).model()
  assert type(read) is encoder.Encoder and read.config == test_encoder.CONFIG
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(read)), nnx.to_pure_dict(nnx.state(model)))


def test_every_row_of_the_table_is_used(model):
  """`tensors` above is written from the model, the table by hand: neither may have a name that the other lacks."""
  numbered = {name.replace('layer.0', 'layer.{i}') for name in tensors(model) if 'layer.1' not in name}
  assert numbered == {row.theirs for row in bert.NAMES}


def test_tensors_that_do_not_fit_are_refused(tmp_path, model):
  arrays = tensors(model)
  name = 'encoder.layer.1.attention.self.key.weight'
  with pytest.raises(ValueError, match=r"1 of 37 variables have no tensor, the first .*blocks/1/attention/k/kernel"):
    write(tmp_path, {k: v for k, v in arrays.items() if k != name}).model()
  with pytest.raises(ValueError, match=rf"tensor '{name}' has shape \(8, 9\).*has shape \(8, 8\) by the sizes"):
    write(tmp_path, arrays | {name: np.ones((8, 9), np.float32)}).model()
  with pytest.raises(ValueError, match=r"tensors have no place in the model, the first \['encoder.layer.1"):
    write(tmp_path, arrays, num_hidden_layers=1).model()


@pytest.mark.parametrize('key, value', [
    ('hidden_act', 'gelu_new'), ('position_embedding_type', 'relative_key'), ('is_decoder', True)])
def test_other_forms_are_refused(tmp_path, model, key, value):
  with pytest.raises(ValueError, match=f'{key} is {value!r}, and networks of model_type .bert. are built with'):
    write(tmp_path, tensors(model), **{key: value}).model()
