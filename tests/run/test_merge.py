"""`qat merge` on a small network that `qat finetune` has trained: what each way keeps, and what is refused."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from qat.export import bitsandbytes
from qat.models import decoder
from qat.models.pretrained import families
from qat.run import checkpoint
from qat.run import cli
from qat.run import merge
from qat.run import published
from tests.run import tiny_finetune

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a network, texts, and what `qat finetune` made of them on groups of 32 at 3 bits."""
  folder = tmp_path_factory.mktemp('tiny')
  tiny_finetune.network(folder / 'net')
  (folder / 'text.txt').write_text(tiny_finetune.TEXT * 20)
  assert cli.main(['finetune', config(folder, 'w3a16_g32', 20), f'--workdir={folder}/run']) == 0
  return folder


def config(folder, base, steps=6):
  return (f'--config={ROOT}/tests/run/tiny_finetune.py:folder={folder}/net,train={folder}/text.txt,base={base},'
          f'steps={steps}')


def result(folder, name):
  return json.loads((folder / 'run' / 'merged' / name / 'result.json').read_text())


def test_into_floats_nothing_is_lost_and_the_file_reads_back(folder, capfd):
  assert cli.main(['merge', f'--workdir={folder}/run', '--into=float']) == 0
  found = result(folder, 'float')
  assert found['metrics']['mean_kl'] < 1e-6
  assert found['metrics']['loss'] == pytest.approx(found['metrics_before']['loss'], abs=1e-5)
  said = capfd.readouterr().out
  assert 'perplexity' in said and 'mean kl' in said
  stored = folder / 'run' / 'merged' / 'float' / 'model.safetensors'
  again = bitsandbytes.load(decoder.halved(published.load(f'{folder}/net').model), stored, families.FAMILIES['llama'])
  _, adapted = merge.trained(folder / 'run')
  tokens = jnp.arange(24)[None]
  np.testing.assert_allclose(again(tokens), adapted(tokens), atol=1e-4)


def test_a_solver_loses_less_than_rounding_to_nearest(folder):
  assert cli.main(['merge', f'--workdir={folder}/run', '--into=grid', '--method', 'rtn', 'gptq']) == 0
  nearest, solved = (result(folder, f'grid_{name}') for name in ('rtn', 'gptq'))
  assert solved['metrics']['mean_kl'] < nearest['metrics']['mean_kl']
  assert nearest['bits_per_weight'] == solved['bits_per_weight'] < 5
  kept = folder / 'run' / 'merged' / 'grid_gptq'
  arrays = checkpoint.about(kept, 0)['checksums']
  codes = next(name for name in arrays if name.startswith('blocks/0/attention/q') and name.endswith('codes'))
  assert np.abs(checkpoint.array_of(kept, 0, codes)).max() <= 4            # Of 3 bits.
  assert not [name for name in arrays if 'adapters' in name]


def test_into_zeros_nothing_is_lost_and_the_codes_stay(folder, tmp_path):
  argv = [config(folder, 'w3a16_g32'), f'--workdir={tmp_path}']
  assert cli.main(['finetune', *argv, '--config.adapter.group=32', '--config.adapter.rank=2']) == 0
  assert cli.main(['merge', *argv[1:], '--into=zeros']) == 0
  found = json.loads((tmp_path / 'merged' / 'zeros' / 'result.json').read_text())
  assert found['metrics']['mean_kl'] < 1e-6 and found['bits_per_weight'] < 6
  assert found['metrics']['loss'] == pytest.approx(found['metrics_before']['loss'], abs=1e-5)


def test_adapters_on_floats_are_on_no_grid(folder, tmp_path, capfd):
  argv = [config(folder, 'float'), f'--workdir={tmp_path}']
  assert cli.main(['finetune', *argv]) == 0
  assert cli.main(['merge', *argv[1:], '--into=grid']) == 2
  assert 'beside floats' in capfd.readouterr().err


@pytest.mark.parametrize('argv, message', [
    (['--into=float', '--method', 'rtn'], 'only the grid is reached by a method'),
    (['--into=grid', '--method', 'gptqq'], "there is none of that name. Did you mean 'gptq'"),
    (['--into=grid', '--sequences', '0'], 'at least one'),
    (['--into=zeros'], 'an adapter of single inputs')])
def test_what_cannot_be_merged_is_refused_in_one_line(folder, argv, message, capfd):
  assert cli.main(['merge', f'--workdir={folder}/run', *argv]) == 2
  said = capfd.readouterr().err.strip()
  assert message in said and len(said.splitlines()) == 1


def test_a_folder_without_adapters_is_refused(folder, tmp_path, capfd):
  about = json.loads((folder / 'run' / 'config.json').read_text())
  about['adapter']['rules'] = []
  (tmp_path / 'config.json').write_text(json.dumps(about))
  assert cli.main(['merge', f'--workdir={tmp_path}']) == 2
  assert 'nothing to merge' in capfd.readouterr().err
