import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from qat.models.pretrained import folder
from tests.models.pretrained import hf

WEIGHTS = hf.tensors(hf.LLAMA)
Q = 'model.layers.0.self_attn.q_proj.weight'


def read(path):
  return folder.Folder(path).model()


def test_shards_are_read_as_one_file(tmp_path):
  one = read(hf.write(tmp_path / 'one', hf.LLAMA, WEIGHTS))
  many = read(hf.write(tmp_path / 'many', hf.LLAMA, WEIGHTS, shards=3))
  for model in (one, many):
    np.testing.assert_array_equal(model.blocks[0].attention.q.kernel[...], WEIGHTS[Q].T)
    np.testing.assert_array_equal(model.head.kernel[...], WEIGHTS['lm_head.weight'].T)


def test_the_prefix_may_be_left_out(tmp_path):
  short = {name.removeprefix('transformer.'): x for name, x in hf.tensors(hf.GPT2).items()}
  model = read(hf.write(tmp_path, hf.GPT2, short))
  np.testing.assert_array_equal(model.blocks[1].attention.k.kernel[...], short['h.1.attn.c_attn.weight'][:, 16:32])


def test_what_old_files_hold_beside_the_weights_is_ignored(tmp_path):
  old = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32) for i in range(2)}
  read(hf.write(tmp_path / 'llama', hf.LLAMA, WEIGHTS | old))
  mask = {f'transformer.h.{i}.attn.bias': np.ones((1, 1, 32, 32), np.uint8) for i in range(2)}
  read(hf.write(tmp_path / 'gpt2', hf.GPT2, hf.tensors(hf.GPT2) | mask))


def test_a_tied_head_that_is_stored_as_well_is_the_embedding(tmp_path):
  weights = hf.tensors(hf.QWEN3)
  model = read(hf.write(tmp_path, hf.QWEN3, weights | {'lm_head.weight': weights['model.embed_tokens.weight'].copy()}))
  assert not hasattr(model, 'head')


def test_arrays_are_the_model_s_own(tmp_path):
  """A file that is overwritten later does not change a model that was read from it."""
  path = hf.write(tmp_path, hf.LLAMA, WEIGHTS)
  model = read(path)
  with open(path / 'model.safetensors', 'r+b') as file:
    size = file.seek(0, 2)
    file.seek(size // 2)
    file.write(b'\0' * (size - size // 2))
  np.testing.assert_array_equal(model.blocks[0].attention.q.kernel[...], WEIGHTS[Q].T)
  np.testing.assert_array_equal(model.embed.embedding[...], WEIGHTS['model.embed_tokens.weight'])


def test_no_tokenizer_is_none(tmp_path):
  assert folder.Folder(hf.write(tmp_path, hf.LLAMA, WEIGHTS)).tokenizer() is None


@pytest.mark.parametrize('change, message', [
    ({Q: None}, r"1 of 21 variables have no tensor, the first 'blocks/0/attention/q/kernel', which should be "
                r"'layers.0.self_attn.q_proj.weight'. The file has 20 tensors, near it \["),
    ({'model.layers.2.mlp.up_proj.weight': np.ones((24, 16), np.float32)},
     r"1 tensors have no place in the model, the first \['layers.2.mlp.up_proj.weight'\]"),
    ({'model.layers.0.self_attn.q_proj.bias': np.ones(32, np.float32)}, r'1 tensors have no place .*q_proj.bias'),
    ({Q: np.ones((16, 32), np.float32)}, r"q_proj.weight' has shape \(16, 32\), which becomes \(32, 16\): "
                                         r"blocks/0/attention/q/kernel has shape \(16, 32\)"),
    ({Q: WEIGHTS[Q].astype(np.int8)}, "q_proj.weight' is of type I8; weights are read from F64, F32"),
    ({'lm_head.weight': None}, r"'head/kernel', which should be 'lm_head.weight'"),
    ({'layers.0.self_attn.q_proj.weight': WEIGHTS[Q].copy()}, "'layers.0.self_attn.q_proj.weight' is there twice"),
])
def test_tensors_that_do_not_fit(change, message, tmp_path):
  weights = {name: x for name, x in (WEIGHTS | change).items() if x is not None}
  with pytest.raises(ValueError, match=message):
    read(hf.write(tmp_path, hf.LLAMA, weights))


def test_a_fused_tensor_that_cannot_be_split(tmp_path):
  weights = hf.tensors(hf.GPT2) | {'transformer.h.0.attn.c_attn.weight': np.ones((16, 47), np.float32)}
  with pytest.raises(ValueError, match=r"c_attn.weight' of shape \(16, 47\): it cannot become blocks/0/attention/"):
    read(hf.write(tmp_path, hf.GPT2, weights))


@pytest.mark.parametrize('length', [0, 4, 100, 5000, -1])
def test_a_file_that_was_cut(length, tmp_path):
  path = hf.write(tmp_path, hf.LLAMA, WEIGHTS) / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(ValueError, match=r'model.safetensors: \d+ bytes that are no whole safetensors .*get it anew'):
    read(tmp_path)


def test_a_file_of_something_else(tmp_path):
  path = hf.write(tmp_path, hf.LLAMA, WEIGHTS) / 'model.safetensors'
  path.write_bytes(pickle.dumps(list(range(100))))
  with pytest.raises(ValueError, match='no whole safetensors file'):
    read(tmp_path)


def test_a_missing_shard(tmp_path):
  (hf.write(tmp_path, hf.LLAMA, WEIGHTS, shards=3) / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='1 of the 3 files .* are missing, the first model-00002-of-00003'):
    read(tmp_path)


def test_an_index_that_disagrees_with_its_shards(tmp_path):
  hf.write(tmp_path, hf.LLAMA, WEIGHTS, shards=2)
  save_file({Q: WEIGHTS[Q]}, tmp_path / 'model-00002-of-00002.safetensors')
  with pytest.raises(ValueError, match=r'disagree on \d+ tensors, the first'):
    read(tmp_path)


@pytest.mark.parametrize('index', [dict(), dict(weight_map={}), dict(weight_map={Q: '../model.safetensors'}),
                                   dict(weight_map={Q: 3}), dict(weight_map=[Q])])
def test_an_index_that_is_none(index, tmp_path):
  hf.write(tmp_path, hf.LLAMA, WEIGHTS, shards=2)
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match='its weight_map should give the file in this folder'):
    read(tmp_path)


def test_pickles_are_not_opened(tmp_path):

  class Trap:

    def __reduce__(self):
      return open, (str(tmp_path / 'sprung'), 'w')

  hf.write(tmp_path, hf.LLAMA, WEIGHTS)
  (tmp_path / 'model.safetensors').unlink()
  (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap()))
  with pytest.raises(FileNotFoundError, match=r"no model.safetensors.*'pytorch_model.bin'\]. Weights in pickles"):
    read(tmp_path)
  assert not (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('text, message', [
    ('{"model_type": "mamba"}', r"model_type is 'mamba'; the families known are \['\w+'.*'llama'"),
    ('{"model_type": "gemma2"}', "model_type is 'gemma2'; the families known are"),
    ('{}', 'model_type is None; the families known are'),
    ('{"model_type": ["llama"]}', 'model_type is .*; the families known are'),
    ('{"model_type": "llama", "quantization_config": {"bits": 4}}', 'its weights are codes'),
    ('{"model_type": "llama"', 'it is no JSON'),
    ('[]', 'it holds a list, and should hold an object'),
])
def test_configs_of_something_else(text, message, tmp_path):
  hf.write(tmp_path, hf.LLAMA, WEIGHTS)
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=f'config.json: .*{message}'):
    read(tmp_path)


def test_no_config(tmp_path):
  with pytest.raises(FileNotFoundError, match='config.json: there is no such file'):
    read(tmp_path)


def test_a_file_without_tensors(tmp_path):
  hf.write(tmp_path, hf.LLAMA, {})
  with pytest.raises(ValueError, match='has no tensors'):
    read(tmp_path)


def test_eight_bit_floats_are_codes(tmp_path):
  with pytest.raises(ValueError, match='is of type F8_E4M3; weights'):
    read(hf.write(tmp_path, hf.LLAMA, WEIGHTS | {Q: np.asarray(jnp.ones((32, 16), jnp.float8_e4m3fn))}))
