"""TPU pods: the command for every host, and a `gcloud` that runs it here."""

import os
import shlex
import stat

import pytest

from launch import job as values
from launch import tpu_pod

JOBS = values.jobs([f'qat train --config configs/mnist.py --workdir /mnt/runs/{i}' for i in range(3)])
RESOURCES = values.Resources(workers=2, options=dict(pods='v5e-a,v5e-b', zone='us-west4-a', project='lab'))


def test_dry_run_prints_the_command_of_each_pod(capfd):
  assert tpu_pod.launch(JOBS, RESOURCES, dry_run=True) == {}
  lines = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
  assert [words[5] for words in lines] == ['v5e-a', 'v5e-b', 'v5e-a']
  assert lines[0] == [
      'gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'v5e-a', '--zone=us-west4-a', '--project=lab', '--worker=all',
      '--command=cd ~/qat && . .venv/bin/activate && exec env QAT_COORDINATOR=auto flock /tmp/launch.lock '
      'qat train --config configs/mnist.py --workdir /mnt/runs/0']


def test_each_pod_has_one_job_at_a_time(tmp_path, monkeypatch):
  program = tmp_path / 'bin' / 'gcloud'
  program.parent.mkdir()
  program.write_text(f'#!/bin/sh\nmkdir {tmp_path}/busy-$5 || exit 1\necho $5 >> {tmp_path}/pods\nsleep 0.2\n'
                     f'rmdir {tmp_path}/busy-$5\n')
  program.chmod(program.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv('PATH', f'{program.parent}{os.pathsep}{os.environ["PATH"]}')
  jobs = [values.Job(('true',), str(tmp_path / str(i))) for i in range(5)]
  endings = tpu_pod.launch(jobs, RESOURCES)
  assert [e.code for e in endings.values()] == [0] * 5
  assert set((tmp_path / 'pods').read_text().split()) == {'v5e-a', 'v5e-b'}


@pytest.mark.parametrize('workers, options, words', [
    (1, {}, 'Option pods is not given'), (3, dict(pods='a,b'), 'Use --workers 2'),
    (1, dict(pods='a', zoen='b'), "Option 'zoen'")])
def test_wrong_input(workers, options, words):
  with pytest.raises(ValueError, match=words):
    tpu_pod.TpuPod(values.Resources(workers=workers, options=options))


def test_no_gcloud_is_told(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ImportError, match="needs the program 'gcloud'"):
    tpu_pod.launch([values.Job(('true',), str(tmp_path / 'a'))], RESOURCES)
