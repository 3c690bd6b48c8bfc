"""Two processes of 4 devices each are one process of 8, also when one of them is killed, or both are told to leave."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from qat.run import checkpoint
from qat.run import hosts
from tests.run import mesh_config
from tests.run.test_mesh import FLAGS

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
CONFIG = f'{mesh_config.__file__}:model=mlp,recipe=%s,steps={STEPS}'
SECONDS = 120


def port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start(workdir, processes=2, *flags, config=CONFIG % 'float'):
  """The processes of a run on a mesh of 8 devices."""
  env = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=FLAGS.format(8 // processes))
  command = [sys.executable, '-m', 'qat.run', 'train', f'--config={config}', f'--workdir={workdir}',
             '--config.mesh.data=4', '--config.mesh.model=2', '--config.checkpoint_every_steps=5', *flags]
  where = [] if processes == 1 else [f'--coordinator=127.0.0.1:{port()}', f'--processes={processes}']
  found = []
  for k in range(processes):
    names = [workdir.with_suffix(f'.{k}.{kind}') for kind in ('out', 'err')]
    # Files, since pipes that nobody empties would hold a process up.
    with open(names[0], 'w') as out, open(names[1], 'w') as err:
      found.append(subprocess.Popen([*command, *where, *([f'--process_id={k}'] if where else [])], cwd=ROOT, env=env,
                                    stdout=out, stderr=err))
    found[-1].logs = names
  return found


def read(process):
  """(stdout, stderr) so far."""
  return tuple(log.read_text() for log in process.logs)


def finish(processes, code=0):
  """(stdout, stderr) of each of the processes, which must end so."""
  try:
    for process in processes:
      process.wait(SECONDS)
      assert process.returncode == code, read(process)
  finally:
    end(processes)
  return [read(process) for process in processes]


def end(processes):
  for process in processes:
    process.kill()
    process.wait()


def reach(processes, workdir, step):
  """Waits until the run has logged `step`."""
  path, deadline = workdir / 'metrics.jsonl', time.monotonic() + SECONDS
  while time.monotonic() < deadline and all(p.poll() is None for p in processes):
    if path.is_file() and f'"step": {step}, "split": "train"' in path.read_text():
      return
    time.sleep(0.002)
  end(processes)
  raise AssertionError(f'step {step} was not reached: {[read(p) for p in processes]}')


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def check_equal(ours, theirs, within):
  """Two metrics.jsonl agree."""
  assert [(line['step'], line['split']) for line in ours] == [(line['step'], line['split']) for line in theirs]
  for a, b in zip(ours, theirs):
    for name in set(a) - {'seconds', 'split'}:
      assert a[name] == pytest.approx(b[name], rel=0, abs=within), (a, b)


def test_a_killed_process_ends_the_others_and_all_go_on(tmp_path):
  finish(start(tmp_path / 'one', 1))
  workdir = tmp_path / 'two'
  processes = start(workdir)
  reach(processes, workdir, 12)
  processes[1].kill()
  began = time.monotonic()
  processes[0].wait(SECONDS)
  assert time.monotonic() - began < 60
  time.sleep(1)                                                          # For its child to speak.
  end(processes)
  _, err = read(processes[0])
  assert processes[0].returncode == hosts.LOST, err
  assert 'process 0 of 2' in err and 'another process is gone' in err and 'go on from the last checkpoint' in err
  assert not (workdir / 'result.json').exists()

  (out, _), (silent, _) = finish(start(workdir))
  assert 'Going on from step' in out and 'step' not in silent
  two, one = (json.loads((tmp_path / k / 'result.json').read_text()) for k in ('two', 'one'))
  assert two['mesh']['processes'] == 2 and one['mesh']['processes'] == 1
  assert two['metrics'] == pytest.approx(one['metrics'], abs=1e-5)
  check_equal(lines(workdir), lines(tmp_path / 'one'), 1e-5)
  assert len(list((workdir / 'tensorboard').iterdir())) == 2             # One a start, by process 0 alone.


@pytest.mark.slow
@pytest.mark.parametrize('told', [(0, 1), (1,)])
def test_a_signal_stops_all_and_they_go_on_to_the_same_numbers(tmp_path, told):
  config = CONFIG % 'stochastic'                                         # Its random rounding must go on as well.
  finish(start(tmp_path / 'whole', config=config))
  workdir = tmp_path / 'run'
  processes = start(workdir, config=config)
  reach(processes, workdir, 25)
  for k in told:
    processes[k].send_signal(signal.SIGTERM)
  (out, _), _ = finish(processes)
  saved = checkpoint.steps(workdir)[-1]
  assert 25 <= saved < STEPS and f'SIGTERM: saved at step {saved} of {STEPS}.' in out
  assert not (workdir / 'result.json').exists()
  (out, _), _ = finish(start(workdir, config=config))
  assert f'Going on from step {saved} of {STEPS}.' in out
  check_equal(lines(workdir), lines(tmp_path / 'whole'), 0)


@pytest.mark.slow
def test_a_killed_first_process_ends_the_others(tmp_path):
  workdir = tmp_path / 'run'
  processes = start(workdir)
  reach(processes, workdir, 12)
  processes[0].kill()
  processes[1].wait(SECONDS)
  time.sleep(1)
  end(processes)
  assert processes[1].returncode == hosts.LOST
  assert 'another process is gone' in read(processes[1])[1]


@pytest.mark.slow
@pytest.mark.parametrize('arg', ['recipe=w8a8', 'recipe=w4a16_g64,width=64', 'model=mlp,recipe=lsq'])
def test_two_processes_are_one(tmp_path, arg):
  config = f'{mesh_config.__file__}:{arg}'
  finish(start(tmp_path / 'one', 1, config=config))
  finish(start(tmp_path / 'two', 2, config=config))
  check_equal(lines(tmp_path / 'two'), lines(tmp_path / 'one'), 1e-5)


def test_a_wrong_mesh_is_said_once_by_each(tmp_path):
  found = finish(start(tmp_path / 'run', 2, '--config.mesh.model=1'), code=2)
  assert any('is of 4 devices: there are 8 of 2 processes' in err for _, err in found)


SLURM = dict(SLURM_PROCID='1', SLURM_STEP_NODELIST='a,b')


@pytest.mark.parametrize('flags, environ, found', [
    ({}, {}, None),
    (dict(coordinator='a:1', processes='2', process_id='1'), {}, ('a:1', 2, 1)),
    (dict(process_id='0'), dict(QAT_COORDINATOR='a:1', QAT_PROCESSES='2', QAT_PROCESS_ID='1'), ('a:1', 2, 0)),
    (dict(coordinator='auto'), {}, ('auto', None, None)),
    ({}, dict(SLURM, SLURM_NTASKS='2'), ('auto', None, None)),
    ({}, dict(SLURM, SLURM_NTASKS='1'), None),
    ({}, dict(SLURM_NTASKS='2'), None),                                  # In sbatch itself, before srun.
    ({}, dict(TPU_WORKER_HOSTNAMES='a,b'), ('auto', None, None)),
    ({}, dict(TPU_WORKER_HOSTNAMES='localhost'), None),
])
def test_where_the_others_are(flags, environ, found):
  assert hosts.settings(flags, environ) == found


@pytest.mark.parametrize('flags, words', [
    (dict(coordinator='a:1'), ["['processes', 'process_id'] are not given"]),
    (dict(coordinator='a', processes='2', process_id='0'), ["'a'", 'no host:port']),
    (dict(coordinator='a:1', processes='2', process_id='2'), ['numbered from 0']),
    (dict(coordinator='a:1', processes='two', process_id='0'), ['--processes two']),
])
def test_wrong_flags_say_what_is_missing(flags, words):
  with pytest.raises(ValueError) as error:
    hosts.settings(flags, {})
  assert all(word in str(error.value) for word in words), error.value


def test_flags_are_taken_out_of_the_arguments():
  flags, rest = hosts.split(['--config=a.py', '--coordinator', 'a:1', '--processes=2', '--workdir', 'w'])
  assert flags == dict(coordinator='a:1', processes='2')
  assert rest == ['--config=a.py', '--workdir', 'w']


def test_what_ended_a_process():
  assert hosts.verdict(jax.errors.JaxRuntimeError('UNKNOWN: Gloo: Connection closed by peer'))[0] == hosts.LOST
  code, text = hosts.verdict(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'))
  assert code == 1 and 'Out of memory' in text
