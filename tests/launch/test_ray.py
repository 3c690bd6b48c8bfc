"""A Ray cluster that the test starts."""

import pytest

from launch import job as values
from launch import ray as engine
from tests.launch import sweeps

Status = values.Status


def shell(folder, name, script, result=''):
  return values.Job(('sh', '-c', script), str(folder / name), result)


def test_dry_run(tmp_path, capfd):
  resources = values.Resources(cpus=2, gpus=1, memory_gb=4, options=dict(resources=dict(TPU=4)))
  assert engine.launch([shell(tmp_path, 'a', 'true')], resources, dry_run=True) == {}
  assert capfd.readouterr().out == (
      'ray.remote(run).options(**{"name": "a", "num_cpus": 2, "num_gpus": 1, "memory": 4294967296, '
      '"resources": {"TPU": 4}, "max_retries": 0}).remote(\'sh -c true\')\n')


def test_exit_codes_logs_and_preemption(tmp_path):
  pytest.importorskip('ray')
  script = f'cd {tmp_path}/a; echo x >> starts; [ $(wc -l < starts) = 2 ] && touch result || kill -TERM $$'
  jobs = [shell(tmp_path, 'good', 'echo said'), shell(tmp_path, 'bad', 'exit 3'),
          shell(tmp_path, 'a', script, 'result')]
  endings = engine.launch(jobs, values.Resources(workers=2))
  assert {job.name: (e.status, e.code, e.starts) for job, e in endings.items()} == dict(
      good=(Status.FINISHED, 0, 1), bad=(Status.FAILED, 3, 1), a=(Status.FINISHED, 0, 2))
  assert jobs[0].log.read_text().splitlines()[1:] == ['said']


def test_stopping_saves(tmp_path):
  pytest.importorskip('ray')
  ray = engine.Ray(values.Resources())
  script = f'trap "touch {tmp_path}/saved; exit 0" TERM; touch {tmp_path}/up; while :; do sleep 0.02; done'
  handle = ray.start(shell(tmp_path, 'a', script))
  sweeps.until((tmp_path / 'up').exists)
  ray.stop(handle)
  sweeps.until((tmp_path / 'saved').exists)
  sweeps.until(lambda: ray.code(handle) is not None)
  ray.close()


def test_a_sweep_of_twelve_that_is_killed_half_way(tmp_path):
  pytest.importorskip('ray')
  argv = ('--set', ':bits=2,3,4', '--set', 'seed=0..3', '--set', 'step_seconds=0.1', '--workers', '2', '--launcher',
          'ray')
  sweeps.killed_and_started_again(tmp_path, 4, *argv)


def test_a_cluster_that_does_not_answer(tmp_path):
  pytest.importorskip('ray')
  with pytest.raises(OSError, match='Ray cluster .* cannot be reached'):
    engine.launch([shell(tmp_path, 'a', 'true')], values.Resources(options=dict(address='127.0.0.1:1')))
