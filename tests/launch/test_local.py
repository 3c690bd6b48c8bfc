"""Processes of this machine: real ones, real signals."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import job as values
from launch import local
from launch import once

ROOT = pathlib.Path(__file__).parents[2]
Status = values.Status
SECONDS = 120  # On a busy machine.
ONE, TWO = values.Resources(), values.Resources(workers=2)


def shell(folder, name, script, result=''):
  return values.Job(('sh', '-c', script), str(folder / name), result)


def cli(folder, *argv):
  """The process of a launcher that works in a folder."""
  return subprocess.Popen([sys.executable, '-m', 'launch.local', *argv], cwd=folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))


def until(condition):
  deadline = time.monotonic() + SECONDS
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_exit_codes_and_logs(tmp_path, capfd):
  jobs = [shell(tmp_path, 'good', 'echo said; echo moaned >&2'), shell(tmp_path, 'bad', 'exit 3'),
          values.Job(('no-such-program',), str(tmp_path / 'none'))]
  endings = local.launch(jobs, TWO)
  assert {job.name: (e.status, e.code) for job, e in endings.items()} == dict(
      good=(Status.FINISHED, 0), bad=(Status.FAILED, 3), none=(Status.FAILED, once.NOT_FOUND))
  said = jobs[0].log.read_text().splitlines()
  assert said[1:] == ['said', 'moaned'] and "sh -c 'echo said" in said[0]
  assert 'cannot be run: No such file' in jobs[2].log.read_text()
  assert '3/3  ' in capfd.readouterr().out


def test_no_more_at_once_than_workers(tmp_path):
  count = f'echo + >> {tmp_path}/events; sleep 0.2; echo - >> {tmp_path}/events'
  local.launch([shell(tmp_path, str(i), count) for i in range(6)], TWO)
  depth = most = 0
  for event in (tmp_path / 'events').read_text().split():
    depth += 1 if event == '+' else -1
    most = max(most, depth)
  assert most == 2 and depth == 0


@pytest.mark.parametrize('how', ['kill -TERM $$', 'kill -KILL $$', 'exit 143', 'exit 0'])
def test_what_was_preempted_goes_on(tmp_path, how):
  """'exit 0' without a result is how qat train leaves after SIGTERM."""
  script = f'cd {tmp_path}/a; echo x >> starts; [ $(wc -l < starts) = 3 ] && touch result || {how}'
  ending, = local.launch([shell(tmp_path, 'a', script, 'result')], ONE).values()
  assert ending == values.Ending(Status.FINISHED, 0, 3)


def test_restarts_have_an_end(tmp_path):
  ending, = local.launch([shell(tmp_path, 'a', 'kill -TERM $$')], values.Resources(restarts=2)).values()
  assert ending == values.Ending(Status.STOPPED, -signal.SIGTERM, 3)


def test_what_failed_is_not_repeated(tmp_path):
  local.launch([shell(tmp_path, 'a', f'echo x >> {tmp_path}/starts; exit 1')], ONE)
  assert (tmp_path / 'starts').read_text() == 'x\n'


def test_what_is_done_is_not_run(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'result').touch()
  ending, = local.launch([shell(tmp_path, 'a', f'touch {tmp_path}/ran', 'result')], ONE).values()
  assert ending.status is Status.FINISHED and not (tmp_path / 'ran').exists()


def test_dry_run_prints_and_runs_nothing(tmp_path, capfd):
  assert local.launch([shell(tmp_path, 'a', 'true')], ONE, dry_run=True) == {}
  assert capfd.readouterr().out == f'sh -c true  >> {tmp_path}/a/log.txt 2>&1\n'
  assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_awaited(tmp_path, number):
  script = f'trap "sleep 0.3; touch {tmp_path}/saved; exit 0" TERM; touch {tmp_path}/up; while :; do sleep 0.05; done'
  process = cli(tmp_path, f"sh -c '{script}'", 'echo never')
  until((tmp_path / 'up').exists)
  process.send_signal(number)
  out, err = process.communicate(timeout=SECONDS)
  assert process.returncode == 1 and (tmp_path / 'saved').exists()
  assert f'{number.name}: passed on. 1 of 2 jobs' in err and 'never' not in out


def test_jobs_end_with_a_launcher_that_is_killed_and_the_next_waits_for_them(tmp_path):
  """The job saves for a while after SIGTERM: the next one must not begin before."""
  words = f'trap "sleep 0.5; echo saved >> {tmp_path}/log; exit 0" TERM; '
  first = words + f'touch {tmp_path}/up; while :; do sleep 0.02; done'
  code = ('from launch import job, local; '
          f'local.launch([job.Job(("sh", "-c", {first!r}), {str(tmp_path / "a")!r}, "result")], job.Resources())')
  process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
  until((tmp_path / 'up').exists)
  process.kill()
  process.wait()
  local.launch([shell(tmp_path, 'a', f'echo next >> {tmp_path}/log; touch {tmp_path}/a/result', 'result')], ONE)
  assert (tmp_path / 'log').read_text().split() == ['saved', 'next']
  assert 'is held by a process that works here still' in (tmp_path / 'a' / 'log.txt').read_text()


def test_gpus_are_shared_out(tmp_path):
  jobs = [shell(tmp_path, str(i), 'echo gpus=$CUDA_VISIBLE_DEVICES; sleep 0.2') for i in range(2)]
  local.launch(jobs, values.Resources(workers=2, gpus=2))
  assert sorted(job.log.read_text().split('gpus=')[2].strip() for job in jobs) == ['0,1', '2,3']


def test_programs_beside_this_python_are_found_without_an_activated_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', os.defpath)
  job = values.Job(('python', '-c', 'import sys; print(sys.executable)'), str(tmp_path / 'a'))
  local.launch([job], ONE)
  assert pathlib.Path(job.log.read_text().splitlines()[-1]).parent == pathlib.Path(sys.executable).parent


@pytest.mark.parametrize('argv, words', [
    (['--workers', '0', 'true'], 'workers=0: it is a whole number of 1 or more'),
    (['--option', 'partition=gpu', 'true'], "Option 'partition': launch.local has none"),
    (['--option', 'partition', 'true'], 'is no NAME=VALUE'), ([''], 'Command 0 is empty'),
    (['qat train --workdir /tmp/a', 'qat train --workdir=/tmp/a'], 'is that of two commands')])
def test_wrong_input(tmp_path, argv, words):
  process = cli(tmp_path, *argv)
  _, err = process.communicate(timeout=SECONDS)
  assert process.returncode == 2 and words in err and 'Traceback' not in err and len(err.splitlines()) == 1


def test_commands_that_leave_a_result_are_known():
  jobs = values.jobs(['qat train --config c.py --workdir /tmp/a', 'qat evaluate --workdir=/tmp/b', ('echo', 'hi')])
  assert [(job.workdir, job.result) for job in jobs] == [
      ('/tmp/a', 'result.json'), ('/tmp/b', ''), ('runs/launched/2', '')]
