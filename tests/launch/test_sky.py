"""SkyPilot: task files read by yaml, and by SkyPilot where it is installed; a `sky` that does as it is told."""

import os
import shutil
import stat
import sys

import pytest
import yaml

from launch import job as values
from launch import sky

OPTIONS = dict(bucket='s3://my-runs', accelerators='H100:1', infra='aws/us-east-1')
RESOURCES = values.Resources(cpus=8, memory_gb=64, options=OPTIONS)
Status = values.Status


def train(name='bits=2,seed=0-1a2b3c4d'):
  argv = ('qat', 'train', '--config', 'configs/mnist.py:bits=2', '--config.model.sizes=(64, 10)', '--workdir',
          f'runs/s/{name}')
  return values.Job(argv, f'runs/s/{name}', 'result.json')


def test_the_task_file(capfd):
  assert sky.launch([train()], RESOURCES, dry_run=True) == {}
  task = yaml.safe_load(capfd.readouterr().out)
  assert task == dict(
      name='qat-bits-2-seed-0-1a2b3c4d', workdir='.',
      resources=dict(cpus='8+', memory='64+', accelerators='H100:1', use_spot=True, infra='aws/us-east-1'),
      file_mounts={'~/sky_workdir/runs': dict(source='s3://my-runs', mode='MOUNT')}, setup='pip install --editable .',
      run="mkdir -p runs/s/bits=2,seed=0-1a2b3c4d && qat train --config configs/mnist.py:bits=2 "
          "'--config.model.sizes=(64, 10)' --workdir runs/s/bits=2,seed=0-1a2b3c4d")


def test_skypilot_reads_it():
  pilot = pytest.importorskip('sky')
  task = pilot.Task.from_yaml_config(yaml.safe_load(sky.yaml(sky.task(train(), RESOURCES))))
  resources, = task.resources
  assert resources.accelerators == {'H100': 1} and resources.use_spot and resources.cpus == '8+'
  assert task.run == sky.task(train(), RESOURCES)['run']


@pytest.mark.parametrize('job, options, words', [
    (train(), {}, 'what a run leaves would be lost'),
    (values.Job(('a',), '/tmp/a'), OPTIONS, 'first folder of a relative'),
    (train(), dict(OPTIONS, buket='x'), "Option 'buket'")])
def test_wrong_input(job, options, words):
  with pytest.raises(ValueError, match=words):
    sky.launch([job], values.Resources(options=options), dry_run=True)


@pytest.fixture
def pilot(tmp_path, monkeypatch):
  """A program `sky` that notes its arguments and ends as the file `codes` says, one line a call."""
  if shutil.which('sky', path=os.path.dirname(sys.executable)):
    pytest.skip('SkyPilot itself is beside this Python, and would be called')
  program = tmp_path / 'bin' / 'sky'
  program.parent.mkdir()
  program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncode=$(head -1 {tmp_path}/codes)\n'
                     f'sed -i 1d {tmp_path}/codes\n'
                     '[ $code = 0 ] && for d in runs/s/*; do touch $d/result.json; done\nexit $code\n')
  program.chmod(program.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv('PATH', f'{program.parent}{os.pathsep}{os.environ["PATH"]}')
  monkeypatch.chdir(tmp_path)

  def run(*codes):
    (tmp_path / 'codes').write_text('\n'.join(map(str, codes)) + '\n')
    ending, = sky.launch([train()], RESOURCES).values()
    return ending, [call.split(' --')[0] for call in (tmp_path / 'calls').read_text().splitlines()]
  return run


def test_a_job_that_succeeds(pilot):
  ending, calls = pilot(0)
  assert ending.status is Status.FINISHED and calls == ['jobs launch']


def test_a_job_that_fails_is_launched_anew_next_time(pilot):
  ending, _ = pilot(100)
  assert ending == values.Ending(Status.FAILED, 100, 1)
  ending, calls = pilot(0)
  assert ending.status is Status.FINISHED and calls == ['jobs launch', 'jobs launch']


def test_a_log_that_breaks_off_is_taken_up_again(pilot):
  """101: the job goes on in the cloud."""
  ending, calls = pilot(101, 0)
  assert ending.status is Status.FINISHED and calls == ['jobs launch', 'jobs logs']


def test_a_job_that_a_killed_launcher_left_is_found_or_else_launched(pilot, tmp_path):
  left = tmp_path / train().workdir / 'sky.yaml'
  left.parent.mkdir(parents=True)
  left.touch()
  ending, calls = pilot(102, 0)
  assert ending.status is Status.FINISHED and calls == ['jobs logs', 'jobs launch']
