"""What `qat reproduce <paper> --scale full` prints can be typed: programs, configs and leaves are there."""

import pathlib
import shlex

import pytest

from qat.run import cli
from qat.run import config as configs
from qat.run import full_scale

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENTS = ROOT / 'experiments'
SETTINGS, _ = full_scale.load(EXPERIMENTS)


@pytest.mark.parametrize('name', SETTINGS)
def test_commands_are_of_configs_that_are_there(name):
  workdirs = []
  for command in SETTINGS[name]['commands']:
    program, *argv = shlex.split(command)
    if program == 'hf':
      continue
    assert program == 'qat' and argv[0] in cli.PROGRAMS
    config, workdir = configs.parse([a.replace('configs/', f'{ROOT}/configs/') for a in argv[1:]])
    assert str(workdir) not in workdirs
    before = config.get('init_from', '') or (config.pretrained if config.get('task') == 'trained' else '')
    assert not before or before in workdirs, f'{command} reads what no command before it leaves'
    workdirs.append(str(workdir))
  assert workdirs


def test_it_is_printed_and_nothing_runs(capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert cli.main(['reproduce', 'lsq', 'gptq', '--scale', 'full', f'--experiments={EXPERIMENTS}']) == 0
  out = capsys.readouterr().out
  assert 'qat train --config configs/imagenet_resnet.py:model=resnet50,bits=2,init_from=runs/resnet50' in out
  assert '8 GPUs' in out and '67.6' in out and 'not run here; docs/data.md' in out and 'GPTQ 6.43' in out
  assert not list(tmp_path.iterdir())


def test_a_paper_without_a_setting(capsys):
  assert cli.main(['reproduce', 'lsqq', '--scale', 'full', f'--experiments={EXPERIMENTS}']) == 2
  assert "Did you mean 'lsq'?" in capsys.readouterr().err
  assert cli.main(['reproduce', 'lsq', '--scale', 'full', '--experiments=/none']) == 2
  assert 'it has no full_scale.py' in capsys.readouterr().err
