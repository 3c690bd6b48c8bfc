"""SLURM by submitit: its local executor runs, and sbatch scripts are read back by their rules."""

import json
import os
import pathlib
import shutil
import signal
import shlex
import subprocess
import time
import types

import pytest

from launch import job as values
from launch import local
from launch import slurm
from tests.launch import sweeps

pytest.importorskip('submitit')
Status = values.Status
LOCAL = values.Resources(workers=2, options=dict(cluster='local'))
CLUSTER = values.Resources(workers=2, cpus=4, gpus=1, memory_gb=16, hours=1.5,
                           options=dict(partition='gpu', account='lab', signal_delay_s=90))


def shell(folder, name, script, result=''):
  return values.Job(('sh', '-c', script), str(folder / name), result)


def test_exit_codes_and_logs(tmp_path):
  jobs = [shell(tmp_path, 'good', 'echo said'), shell(tmp_path, 'bad', 'exit 3')]
  endings = slurm.launch(jobs, LOCAL)
  assert {job.name: (e.status, e.code) for job, e in endings.items()} == dict(
      good=(Status.FINISHED, 0), bad=(Status.FAILED, 3))
  assert jobs[0].log.read_text().splitlines()[1:] == ['said']


def test_a_warning_before_the_node_goes_saves_and_queues_again(tmp_path):
  """SIGUSR2 to submitit's process, as SLURM sends it: SIGTERM for the command, which then goes on."""
  script = (f'cd {tmp_path}/a; echo x >> starts; [ $(wc -l < starts) = 2 ] && touch result && exit 0; '
            'trap "touch saved; exit 0" TERM; touch up; while :; do sleep 0.02; done')
  job = shell(tmp_path, 'a', script, 'result')
  engine = slurm.Slurm(LOCAL)
  handle = engine.start(job)
  sweeps.until((tmp_path / 'a' / 'up').exists)
  children = f'/proc/{handle._process.pid}/task/{handle._process.pid}/children'
  node, = pathlib.Path(children).read_text().split()
  os.kill(int(node), signal.SIGUSR2)
  sweeps.until(lambda: engine.code(handle) is not None)
  assert engine.code(handle) == 0
  assert (tmp_path / 'a' / 'saved').exists() and (tmp_path / 'a' / 'starts').read_text() == 'x\nx\n'


def test_a_sweep_of_twelve_that_is_killed_half_way(tmp_path):
  argv = ('--set', ':bits=2,3,4', '--set', 'seed=0..3', '--set', 'step_seconds=0.02', '--workers', '4', '--launcher',
          'slurm', '--option', 'cluster=local')
  sweeps.killed_and_started_again(tmp_path, 4, *argv)


def flags(script):
  """{name: value} of the #SBATCH lines."""
  found = {}
  for line in script.splitlines():
    if line.startswith('#SBATCH '):
      name, _, value = shlex.split(line)[1].removeprefix('--').partition('=')
      found[name] = value
  return found


def test_the_sbatch_script(tmp_path, capfd):
  job = shell(tmp_path, 'bits=2-0f', 'echo hi')
  assert slurm.launch([job], CLUSTER, dry_run=True) == {}
  script = capfd.readouterr().out
  found = flags(script)
  expected = {'cpus-per-task': '4', 'gpus-per-node': '1', 'mem': '16GB', 'time': '90', 'partition': 'gpu',
              'account': 'lab', 'signal': 'USR2@90', 'open-mode': 'append', 'job-name': 'bits=2-0f', 'nodes': '1'}
  assert expected.items() <= found.items()
  assert script.startswith('#!/bin/bash\n') and "# which runs: sh -c 'echo hi'" in script
  subprocess.run(['bash', '-n'], input=script, text=True, check=True)
  assert not (tmp_path / 'bits=2-0f').exists()


def test_a_job_of_many_processes(tmp_path, capfd):
  resources = values.Resources(gpus=8, options=dict(nodes=2, ntasks_per_node=8))
  assert slurm.launch([shell(tmp_path, 'a', 'echo hi')], resources, dry_run=True) == {}
  assert {'nodes': '2', 'ntasks-per-node': '8', 'gpus-per-node': '8'}.items() <= flags(capfd.readouterr().out).items()
  engine = slurm.Slurm(resources)
  assert engine.count == 16 and slurm.Slurm(CLUSTER).count == 1

  class Ended:
    """Stands in for submitit's Job of processes that have ended with these codes."""
    def __init__(self, codes):
      self.codes, self.num_tasks, self.job_id = codes, len(codes), '1'
      self.paths = types.SimpleNamespace(result_pickle=tmp_path)

    def task(self, i):
      return types.SimpleNamespace(paths=self.paths, result=lambda: self.codes[i])

  assert [engine.code(Ended(codes)) for codes in ([0, 0], [values.LOST, 2], [0, values.LOST])] == [0, 2, values.LOST]


def test_each_process_of_a_job_has_its_own_lock(tmp_path, monkeypatch):
  monkeypatch.setenv('SLURM_PROCID', '3')
  word = 'test -f run.3.lock && test ! -f run.lock && echo $LAUNCH_TASK'
  job = shell(tmp_path, 'a', f'cd {tmp_path}/a && {word}')
  task = slurm.Task(local.wrapped(job, parent=None), str(tmp_path / 'log'), str(tmp_path), together=True)
  assert task() == 0 and (tmp_path / 'log').read_text().splitlines()[-1] == '3'


def test_no_cluster_is_told(tmp_path):
  if shutil.which('srun'):
    pytest.skip('this machine has SLURM')
  with pytest.raises(OSError, match='SLURM took no job.*--option cluster=local'):
    slurm.launch([shell(tmp_path, 'a', 'true')], values.Resources())


@pytest.mark.parametrize('options, words', [
    (dict(cluster='pbs'), 'Choose among slurm, local'), (dict(partitoin='a'), "Option 'partitoin'")])
def test_wrong_options(options, words):
  with pytest.raises(ValueError, match=words):
    slurm.Slurm(values.Resources(options=options))


needs_cluster = pytest.mark.skipif(
    not shutil.which('sinfo') or subprocess.run(['sinfo'], capture_output=True).returncode != 0,
    reason='no SLURM cluster answers here')


@needs_cluster
def test_a_cluster_that_wants_its_node_back(tmp_path):
  """The signal that SLURM sends first: the command saves, and SLURM queues the job again."""
  script = (f'cd {tmp_path}/a; echo x >> starts; [ $(wc -l < starts) = 2 ] && touch result && exit 0; '
            'trap "touch saved; exit 0" TERM; touch up; while :; do sleep 0.02; done')
  engine = slurm.Slurm(values.Resources())
  handle = engine.start(shell(tmp_path, 'a', script, 'result'))
  sweeps.until((tmp_path / 'a' / 'up').exists)
  subprocess.run(['scancel', '--signal=USR2', handle.job_id], check=True)
  sweeps.until((tmp_path / 'a' / 'saved').exists)
  reason = ['squeue', '--noheader', '--format=%r', f'--jobs={handle.job_id}']
  sweeps.until(lambda: 'BeginTime' in subprocess.run(reason, capture_output=True, text=True).stdout)
  subprocess.run(['scontrol', 'update', f'JobId={handle.job_id}', 'StartTime=now'], check=True)  # Not in two minutes.
  sweeps.until(lambda: engine.code(handle) is not None)
  assert engine.code(handle) == 0 and (tmp_path / 'a' / 'starts').read_text() == 'x\nx\n'


@needs_cluster
def test_a_job_that_is_cancelled_in_the_queue_was_stopped(tmp_path):
  engine = slurm.Slurm(values.Resources())
  handle = engine.start(shell(tmp_path, 'a', f'touch {tmp_path}/up; sleep 100'))
  sweeps.until((tmp_path / 'up').exists)
  subprocess.run(['scancel', '--signal=KILL', '--full', handle.job_id], check=True)
  sweeps.until(lambda: engine.code(handle) is not None)
  assert engine.code(handle) == -signal.SIGTERM


@needs_cluster
def test_sbatch_reads_the_script(tmp_path):
  job = shell(tmp_path, 'a', 'true')
  script = slurm.Slurm(values.Resources(cpus=2, hours=1.5, memory_gb=1)).script(job)
  path = tmp_path / 'job.sh'
  path.write_text(script)
  asked = subprocess.run(['sbatch', '--test-only', str(path)], capture_output=True, text=True)
  assert asked.returncode == 0 and 'to start at' in asked.stderr


@needs_cluster
def test_on_a_cluster(tmp_path):
  """Jobs outlive the launcher: the next one finds them in the queue."""
  shared = values.Resources(workers=2)
  jobs = [shell(tmp_path, 'good', 'echo said'), shell(tmp_path, 'bad', 'exit 3')]
  endings = slurm.launch(jobs, shared)
  assert {job.name: (e.status, e.code) for job, e in endings.items()} == dict(
      good=(Status.FINISHED, 0), bad=(Status.FAILED, 3))
  long = shell(tmp_path, 'long', f'echo x >> {tmp_path}/starts; sleep 5; touch {tmp_path}/long/result', 'result')
  first = slurm.Slurm(shared).start(long)
  sweeps.until((tmp_path / 'starts').exists)
  engine = slurm.Slurm(shared)
  again = engine.start(long)
  assert again.job_id == first.job_id
  while engine.code(again) is None:
    time.sleep(0.5)
  assert long.done() and (tmp_path / 'starts').read_text() == 'x\n'
  assert json.loads(first.job_id) > 0
