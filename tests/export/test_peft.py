"""Adapters in PEFT's layout, on tiny decoders; tests/export/test_peft_peers.py asks PEFT itself."""

import dataclasses
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
from qat.models import encoder
from qat.models import rope
from qat.models.pretrained import families
from qat.nn import lora
from qat.nn import recipes
from qat.nn import transform
from qat.run import classification

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
    (dict(peft_type='LOHA'), "'LOHA'"), (dict(bias='all'), 'bias'),
    (dict(modules_to_save=['head']), "it has modules_to_save ['head']"),
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


BERT = families.FAMILIES['bert']
ENCODER = [r'encoder/blocks/[\w/]+']
INPUTS = dict(tokens=TOKENS, attended=jnp.array([[True] * 6, [True] * 4 + [False] * 2]))


def classifier(classes=3, width=16, scale=20.0, seed=0):
  config = encoder.Config(vocab_size=32, context_length=16, width=width, layers=2, heads=2, ffn_width=24)
  return classification.Classifier(encoder.Encoder(config, nnx.Rngs(seed)), classes, scale, nnx.Rngs(seed))


def trained(**sizes):
  """A classifier with adapters and a head whose numbers are random."""
  model = adapted(classifier(**sizes), ENCODER)
  for i, p in enumerate((model.head.kernel, model.head.bias)):
    p.set_value(jax.random.normal(jax.random.key(50 + i), p.get_value().shape))
  return model


def logits(model):
  return np.asarray(nnx.jit(lambda m: m(INPUTS))(model))


@pytest.mark.parametrize('scale', [16.0, 20.0])
def test_a_classifier_is_saved_and_loaded_with_its_head(tmp_path, scale):
  model = trained(scale=scale)
  peft.save(model, tmp_path, BERT, head=classification.saved(model))
  plain = classifier(scale=scale)
  loaded = peft.load(plain, tmp_path, BERT, head=classification.saved(plain))
  exact = dict(atol=0) if scale == 16 else dict(atol=1e-5)               # Powers of two round nothing.
  np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, **exact)
  assert np.abs(logits(model)).max() > 1 and not logits(plain).any()     # The one that was given stays as it is.


def test_a_head_is_laid_out_as_pefts(tmp_path):
  model = trained()
  peft.save(model, tmp_path, BERT, base='there', head=classification.saved(model))
  tensors, config = load_file(tmp_path / peft.WEIGHTS), json.loads((tmp_path / peft.CONFIG).read_text())
  assert (config['task_type'], config['modules_to_save']) == ('SEQ_CLS', ['classifier'])
  assert config['target_modules'] == ['dense', 'key', 'query', 'value'] and len(tensors) == 2 * 2 * 6 + 2
  np.testing.assert_allclose(tensors['base_model.model.classifier.weight'], 20 * model.head.kernel[...].T, rtol=1e-6)
  np.testing.assert_array_equal(tensors['base_model.model.classifier.bias'], model.head.bias[...])
  A = tensors['base_model.model.bert.encoder.layer.1.attention.output.dense.lora_A.weight']
  adapter = lora.adapters(model)['encoder/blocks/1/attention/o']['default']
  np.testing.assert_array_equal(A, adapter.A[...].T)


def test_a_classifier_is_loaded_beside_codes(tmp_path):
  model = trained()
  peft.save(model, tmp_path, BERT, head=classification.saved(model))
  recipe = recipes.resolve(dict(name='float', rules={ENCODER[0]: 'w8a16'}))
  loaded = peft.load(transform.freeze(transform.quantize(classifier(), recipe)), tmp_path, BERT,
                     head=classification.saved(model))
  difference = np.abs(logits(loaded) - logits(model)).max()
  assert 0 < difference < 0.1 * np.abs(logits(model)).max()


def test_files_that_peft_writes_for_either_name_of_a_head_are_read(tmp_path):
  model = trained()
  peft.save(model, tmp_path, BERT, head=classification.saved(model))
  config = json.loads((tmp_path / peft.CONFIG).read_text()) | dict(modules_to_save=['classifier', 'score'])
  (tmp_path / peft.CONFIG).write_text(json.dumps(config))
  np.testing.assert_allclose(logits(peft.load(classifier(), tmp_path, BERT, head=classification.saved(model))),
                             logits(model), atol=1e-5)


@pytest.mark.parametrize('sizes, head, words', [
    ({}, None, "of task_type 'SEQ_CLS', which go with the adapter. Give the head"),
    ({}, dict(theirs='score'), "and 'score' alone was asked for"),
    ({}, dict(path='encoder/norm'), "Head.path 'encoder/norm' is a LayerNorm"),
    (dict(classes=4), {}, 'weight has shape (3, 16), which becomes (16, 3), and the head takes (16, 4)'),
    (dict(width=32), {}, 'another model')])
def test_a_head_of_another_classifier(tmp_path, sizes, head, words):
  saved = classification.saved(classifier())
  peft.save(trained(), tmp_path, BERT, head=saved)
  with pytest.raises(ValueError, match=re.escape(words)):
    peft.load(classifier(**sizes), tmp_path, BERT, head=None if head is None else dataclasses.replace(saved, **head))


def test_a_head_that_is_not_there(tmp_path):
  head = classification.saved(classifier())
  peft.save(trained(), tmp_path / 'whole', BERT, head=head)
  kept = load_file(tmp_path / 'whole' / peft.WEIGHTS)
  save_file({k: x for k, x in kept.items() if not k.endswith('classifier.bias')}, tmp_path / 'whole' / peft.WEIGHTS)
  with pytest.raises(ValueError, match=r"it has \['weight'\], and the head takes \['bias', 'weight'\]"):
    peft.load(classifier(), tmp_path / 'whole', BERT, head=head)
  with pytest.raises(ValueError, match='no layer of their own'):         # An adapter outside of the body.
    peft.save(adapted(classifier(), [*ENCODER, 'head']), tmp_path / 'new', BERT, head=head)
  assert not (tmp_path / 'new').exists()
