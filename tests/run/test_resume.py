"""A run that is killed at any moment goes on to the same bytes.

Real processes and real signals: nothing of a run may depend on a clean exit.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from qat.run import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 120
CONFIG = f'tests/run/tiny.py:quantizer=stochastic,steps={STEPS}'  # Its random rounding must go on as well.


def start(workdir):
  command = [sys.executable, '-m', 'qat.run.train', f'--config={CONFIG}', f'--workdir={workdir}',
             '--config.checkpoint_every_steps=7']
  return subprocess.Popen(command, cwd=ROOT, env=dict(os.environ, JAX_PLATFORMS='cpu'), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
  """The stdout of a process that must end well."""
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  return out


def reach(process, workdir, step):
  """Waits until the run has logged `step`."""
  path = workdir / 'metrics.jsonl'
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and process.poll() is None:
    if path.is_file() and f'"step": {step}, "split": "train"' in path.read_text():
      return
    time.sleep(0.002)
  raise AssertionError(f'step {step} was not reached: {process.communicate()}')


def final(workdir):
  """{name: bytes} of the last checkpoint."""
  names = checkpoint.about(workdir, STEPS)['checksums']
  return {name: checkpoint.array_of(workdir, STEPS, name).tobytes() for name in names}


def lines(workdir):
  """metrics.jsonl without the wall time."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  finish(start(workdir))
  return workdir


def test_killed_at_three_random_steps(tmp_path, uninterrupted):
  seed = time.time_ns()
  kills = sorted(random.Random(seed).sample(range(1, STEPS - 5), 3))
  print(f'seed {seed}: killed at steps {kills}')
  for step in kills:
    process = start(tmp_path)
    reach(process, tmp_path, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  finish(start(tmp_path))
  expected = final(uninterrupted)
  assert any('stream' in name or 'key' in name or 'count' in name for name in expected)
  assert final(tmp_path) == expected
  assert lines(tmp_path) == lines(uninterrupted)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, uninterrupted):
  process = start(tmp_path)
  reach(process, tmp_path, 20)
  process.send_signal(signal.SIGTERM)
  out = finish(process)
  saved = checkpoint.steps(tmp_path)[-1]
  assert 20 <= saved < STEPS
  assert f'SIGTERM: saved at step {saved} of {STEPS}. The same command goes on from there.' in out
  assert not (tmp_path / 'result.json').exists()
  assert f'Going on from step {saved} of {STEPS}.' in finish(start(tmp_path))
  assert final(tmp_path) == final(uninterrupted)
  assert lines(tmp_path) == lines(uninterrupted)
