"""`qat ptq` on a small network that `qat train` left: what it leaves, that it goes on, and what it refuses."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from qat.run import checkpoint
from qat.run import cli

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f'{ROOT}/configs/ptq.py'


@pytest.fixture(scope='module')
def floats(tmp_path_factory):
  """The workdir of a float run."""
  workdir = tmp_path_factory.mktemp('floats')
  assert cli.main(['train', f'--config={ROOT}/tests/run/tiny.py:steps=60', f'--workdir={workdir}',
                   '--config.checkpoint_every_steps=60']) == 0
  return workdir


def ptq(workdir, floats, arg, *argv):
  return cli.main(['ptq', f'--config={CONFIG}:workdir={floats},{arg}', f'--workdir={workdir}', *argv])


def solved(workdir):
  """{stage: {name: bytes}} of what a walk has kept."""
  folder = workdir / 'solved'
  names = {step: checkpoint.about(folder, step)['checksums'] for step in checkpoint.steps(folder)}
  return {step: {name: checkpoint.array_of(folder, step, name).tobytes() for name in names[step]} for step in names}


def result(workdir):
  return json.loads((workdir / 'result.json').read_text())


def paragraph(capfd):
  """What was said on stderr, which must be one line."""
  said = capfd.readouterr().err.strip()
  assert len(said.splitlines()) == 1 and 'Traceback' not in said, said
  return said


def test_it_leaves_a_table_a_report_and_the_coverage(tmp_path, floats, capfd):
  assert ptq(tmp_path, floats, 'method=gptq,recipe=w4a16,examples=128') == 0
  found, out = result(tmp_path), capfd.readouterr().out
  assert found['metrics']['float_accuracy'] == json.loads((floats / 'result.json').read_text())['metrics']['accuracy']
  assert f'{found["metrics"]["accuracy"]:.5g}' in out and 'training examples' in out
  # 64 x 16 + 16 x 10 codes of 4 bits, and a float32 scale for each of 16 + 10 outputs.
  assert found['bits_per_weight'] == pytest.approx(4 + 32 * 26 / 1184)
  coverage = json.loads((tmp_path / 'coverage.json').read_text())
  assert list(coverage) == ['layers/0', 'layers/1']
  assert all(facts['rows'] == 128 and facts['condition'] >= 1 for facts in coverage.values())
  assert coverage['layers/0']['dead'] > 0                               # Corners of the digits are always dark.
  assert 'layers/1' in (tmp_path / 'report.html').read_text()


def test_a_damaged_stage_is_solved_again_to_the_same_bytes(tmp_path, floats, capfd):
  assert ptq(tmp_path, floats, 'method=gptq,recipe=w3a16') == 0
  before, metrics = solved(tmp_path), result(tmp_path)['metrics']
  for path in (tmp_path / 'solved/checkpoints/1/state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-8] + b'damaged!')
  assert ptq(tmp_path, floats, 'method=gptq,recipe=w3a16') == 0
  assert 'solved again' in capfd.readouterr().err
  assert solved(tmp_path) == before and result(tmp_path)['metrics'] == metrics


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path, floats):
  arg = 'method=adaround,recipe=w2a16'
  command = lambda workdir: [
      sys.executable, '-m', 'qat.run.ptq', f'--config={CONFIG}:workdir={floats},{arg}', f'--workdir={workdir}',
      '--config.method.steps=300']
  start = lambda workdir: subprocess.Popen(command(workdir), cwd=ROOT, env=dict(os.environ, JAX_PLATFORMS='cpu'),
                                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  process, deadline = start(tmp_path / 'killed'), time.monotonic() + 120
  while not checkpoint.steps(tmp_path / 'killed' / 'solved') and time.monotonic() < deadline:
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL and not (tmp_path / 'killed' / 'result.json').exists()
  process = start(tmp_path / 'killed')
  err = process.communicate(timeout=240)[1]
  assert process.returncode == 0, err
  assert ptq(tmp_path / 'whole', floats, arg, '--config.method.steps=300') == 0
  assert solved(tmp_path / 'killed') == solved(tmp_path / 'whole')
  assert result(tmp_path / 'killed')['metrics'] == result(tmp_path / 'whole')['metrics']


@pytest.mark.parametrize('arg, argv, words', [
    ('method=gptk,recipe=w4a16', [], "method 'gptk': there is none of that name. Did you mean 'gptq'?"),
    ('method=gptq,recipe=w4a61', [], "recipe 'w4a61': there is none of that name"),
    ('method=gptq,recipe=w4a16', ['--config.method.rule=hesian'], "range rule 'hesian'"),
    ('method=gptq,recipe=w4a16', ['--config.method.dump=1'], "Did you mean 'method.damp'"),
    ('method=gptq,recipe=w4a16', ['--config.calibration.batch_size=7'], 'A batch_size of 7 does not divide'),
    ('method=gptq,recipe=w4a16', ['--config.task=traind'], "task 'traind'"),
    ('method=gptq,recipe=w4a16_g7', [], "'layers/0', whose weight is 64 inputs x 16 outputs")])
def test_wrong_input_is_one_paragraph(tmp_path, floats, capfd, arg, argv, words):
  capfd.readouterr()
  assert ptq(tmp_path, floats, arg, *argv) == 2
  assert words in paragraph(capfd)
  assert not (tmp_path / 'result.json').exists()


def test_a_workdir_of_another_config_is_refused(tmp_path, floats, capfd):
  assert ptq(tmp_path, floats, 'method=rtn,recipe=w4a16') == 0
  capfd.readouterr()
  assert ptq(tmp_path, floats, 'method=rtn,recipe=w3a16') == 2
  assert "recipe.name: 'w4a16' there, 'w3a16' now" in paragraph(capfd)


def test_a_workdir_without_a_float_run_is_refused(tmp_path, capfd):
  assert ptq(tmp_path, tmp_path / 'nowhere', 'method=rtn,recipe=w4a16') == 2
  assert 'no run started there' in paragraph(capfd)
