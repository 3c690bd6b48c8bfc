"""`qat finetune` and `qat ptq` on 8 simulated devices are what they are on one; programs that know no mesh say so."""

import pathlib

import pytest

from qat.run import cli
from tests.run import tiny_finetune
from tests.run.test_mesh import run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('base', ['nf4_dq', pytest.param('float', marks=pytest.mark.slow)])
def test_finetune(tmp_path, base):
  tiny_finetune.network(tmp_path / 'net')
  (tmp_path / 'text.txt').write_text(tiny_finetune.TEXT * 20)
  config = (f'{ROOT}/tests/run/tiny_finetune.py:folder={tmp_path}/net,train={tmp_path}/text.txt,base={base},steps=4')
  one, many = run('each', 'finetune', tmp_path, config, '', 'data=2,fsdp=2,model=2')
  for a, b in zip(one['lines'], many['lines'], strict=True):
    assert b['loss'] == pytest.approx(a['loss'], abs=1e-5)
  assert one['base_sha256'] == many['base_sha256'] and many['base_unchanged']
  assert 'mesh' not in one
  taken = many['mesh']
  assert taken['axes'] == dict(data=2, fsdp=2, sequence=1, model=2)
  assert taken['base']['bytes_per_device'] < 0.4 * taken['base']['bytes']
  assert taken['trained']['bytes_per_device'] < 0.7 * taken['trained']['bytes']  # Ranks are whole.


@pytest.mark.parametrize('arg', ['method=gptq,recipe=w4a16', pytest.param(
    'method=adaround,recipe=w4a16,smoke', marks=pytest.mark.slow)])
def test_ptq(tmp_path, arg):
  one, many = run('solved', tmp_path, arg, '', 'data=4,model=2')
  assert many['metrics'] == pytest.approx(one['metrics'], abs=1e-3)
  assert many['bits_per_weight'] == one['bits_per_weight'] and many['fallbacks'] == one['fallbacks']
  assert many['mesh']['quantized']['bytes_per_device'] < 0.7 * many['mesh']['quantized']['bytes']


@pytest.mark.parametrize('program, flag', [
    ('quickstart', '--config.mesh.data=2'), ('evaluate', '--coordinator=a:1'), ('report', '--config.sharding=()')])
def test_a_program_without_a_mesh_says_so(program, flag, tmp_path, capsys):
  assert cli.main([program, '--config=configs/quickstart.py', f'--workdir={tmp_path}', flag]) == 2
  error = capsys.readouterr().err
  assert f'{flag.split("=")[0]}: qat {program} runs on one device' in error and 'train, finetune, ptq' in error
