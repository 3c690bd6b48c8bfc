"""Adapters in PEFT's layout, on tiny decoders; tests/export/test_peft_peers.py asks PEFT itself."""

import json
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qat.export import peft
from qat.models import decoder
from qat.models import rope
from qat.models.pretrained import families
from qat.nn import lora

FAMILY = families.FAMILIES['llama']
TOKENS = jnp.arange(12).reshape(2, 6) % 32
ALL = [r'blocks/[\w/]+']


def network(turn=rope.halves, **sizes):
  return decoder.llama(nnx.Rngs(0), **(dict(vocab_size=32, context_length=16, width=16, layers=2, heads=4, kv_heads=2,
                                            rope=rope.Rope(turn=turn)) | sizes))


def adapted(model, rules=ALL, rank=2, alpha=4.0, **settings):
  """A model with an adapter whose A and B are random."""
  model = lora.lora(model, rules, rank, alpha, **settings)
  held = [a for held in lora.adapters(model).values() for a in held.values()]
  for i, p in enumerate([p for a in held for p in (a.A, a.B, a.magnitude) if p is not None]):
    p.set_value(p.get_value() + 0.1 * jax.random.normal(jax.random.key(i), p.get_value().shape))
  return model


def scores(model):
  return np.asarray(nnx.jit(lambda m: m(TOKENS))(model))


@pytest.mark.parametrize('turn', [rope.halves, rope.interleaved])
@pytest.mark.parametrize('settings', [{}, dict(dora=True), dict(scaling=lora.adapters_.by_root_of_rank, dropout=0.25)],
                         ids=['lora', 'dora', 'rs'])
def test_what_is_saved_is_loaded(tmp_path, turn, settings):
  model = adapted(network(turn), **settings)
  peft.save(model, tmp_path, FAMILY)
  loaded = peft.load(network(turn), tmp_path, FAMILY, name='again')
  for path, held in lora.adapters(model).items():
    other = lora.adapters(loaded)[path]['again']
    np.testing.assert_array_equal(other.A[...], held['default'].A[...])
    np.testing.assert_array_equal(other.B[...], held['default'].B[...])
    assert (other.alpha, other.scaling) == (held['default'].alpha, held['default'].scaling)
  model.eval()
  loaded.eval()
  np.testing.assert_array_equal(scores(loaded), scores(model))


def test_the_layout_is_pefts(tmp_path):
  """Names, shapes and the product, by PEFT's documents: the change of a weight [out, in] is s B A."""
  model = adapted(network(), ['embed', *ALL])
  peft.save(model, tmp_path, FAMILY, base='there/it-is')
  tensors, config = load_file(tmp_path / peft.WEIGHTS), json.loads((tmp_path / peft.CONFIG).read_text())
  assert len(tensors) == 2 * (2 * 7 + 1)
  name = 'base_model.model.model.layers.1.self_attn.k_proj'
  A, B = tensors[f'{name}.lora_A.weight'], tensors[f'{name}.lora_B.weight']
  assert (A.shape, B.shape) == ((2, 16), (8, 2))
  adapter = lora.adapters(model)['blocks/1/attention/k']['default']
  np.testing.assert_allclose(4 / 2 * (B @ A).T, adapter.matrices[0] @ adapter.matrices[1], rtol=1e-5)
  words = 'base_model.model.model.embed_tokens.lora_embedding_'
  assert (tensors[f'{words}A'].shape, tensors[f'{words}B'].shape) == ((2, 32), (16, 2))
  assert config['peft_type'] == 'LORA' and config['base_model_name_or_path'] == 'there/it-is'
  targets = [*(f'{x}_proj' for x in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')), 'embed_tokens']
  assert config['target_modules'] == sorted(targets)


def test_outputs_of_queries_are_reordered_for_halves(tmp_path):
  """A model that turns neighbours, and one that turns halves and has its rows reordered, compute the same."""
  model = adapted(network(rope.interleaved))
  other = network(rope.halves)
  order = np.concatenate([4 * h + np.array([0, 2, 1, 3]) for h in range(4)])              # Heads of 4 features.
  for block in other.blocks:
    block.attention.q.kernel.set_value(block.attention.q.kernel[...][:, order])
    block.attention.k.kernel.set_value(block.attention.k.kernel[...][:, order[:8]])
  peft.save(model, tmp_path, FAMILY)
  np.testing.assert_allclose(scores(peft.load(other, tmp_path, FAMILY)), scores(model), atol=1e-5)


def test_layers_of_other_ranks_have_patterns(tmp_path):
  model = adapted(network(), [lora.LoRA('blocks/0/ffn/up', 3, 12.0), 'blocks/.*'])
  peft.save(model, tmp_path, FAMILY)
  config = json.loads((tmp_path / peft.CONFIG).read_text())
  assert len(config['rank_pattern']) + (config['r'] == 3) >= 1
  np.testing.assert_array_equal(scores(peft.load(network(), tmp_path, FAMILY)), scores(model))


def test_some_layers_have_whole_names(tmp_path):
  peft.save(adapted(network(), ['blocks/1/ffn/up']), tmp_path, FAMILY)
  assert json.loads((tmp_path / peft.CONFIG).read_text())['target_modules'] == ['model.layers.1.mlp.up_proj']


def broken(tmp_path, **changes):
  """A folder whose config is changed."""
  peft.save(adapted(network()), tmp_path, FAMILY, overwrite=True)
  config = json.loads((tmp_path / peft.CONFIG).read_text()) | changes
  (tmp_path / peft.CONFIG).write_text(json.dumps(config))
  return tmp_path


@pytest.mark.parametrize('changes, words', [
    (dict(peft_type='LOHA'), "'LOHA'"), (dict(modules_to_save=['head']), 'modules_to_save'), (dict(bias='all'), 'bias'),
    (dict(r=3), 'lora_A has shape'), (dict(r=99), 'rank 99')])
def test_what_is_not_read_is_refused(tmp_path, changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    peft.load(network(), broken(tmp_path, **changes), FAMILY)


def test_files_that_are_not_whole(tmp_path):
  with pytest.raises(ValueError, match='is not there'):
    peft.load(network(), tmp_path, FAMILY)
  folder = broken(tmp_path)
  data = (folder / peft.WEIGHTS).read_bytes()
  (folder / peft.WEIGHTS).write_bytes(data[:len(data) // 2])
  with pytest.raises(ValueError, match='not whole'):
    peft.load(network(), folder, FAMILY)
  save_file({k: x for k, x in list(load_file_of(data, tmp_path).items())[1:]}, folder / peft.WEIGHTS)
  with pytest.raises(ValueError, match='should have'):
    peft.load(network(), folder, FAMILY)


def load_file_of(data, tmp_path):
  (tmp_path / 'whole').write_bytes(data)
  return load_file(tmp_path / 'whole')


def test_an_adapter_of_another_model(tmp_path):
  peft.save(adapted(network()), tmp_path, FAMILY)
  with pytest.raises(ValueError, match='belong to no layer'):
    peft.load(network(layers=1), tmp_path, FAMILY)
  with pytest.raises(ValueError, match='another model'):
    peft.load(network(ffn_width=96), tmp_path, FAMILY)


def test_nothing_is_written_over(tmp_path):
  model = adapted(network())
  peft.save(model, tmp_path, FAMILY)
  before = (tmp_path / peft.WEIGHTS).read_bytes()
  with pytest.raises(ValueError, match='already'):
    peft.save(model, tmp_path, FAMILY)
  with pytest.raises(ValueError, match='no adapter'):
    peft.save(model, tmp_path / 'new', FAMILY, name='other')
  assert (tmp_path / peft.WEIGHTS).read_bytes() == before and not (tmp_path / 'new').exists()
