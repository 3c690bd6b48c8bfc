"""A run that is killed or told to end at any moment goes on to the same bytes.

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


def test_killed_and_then_told_to_end_it_goes_on_to_the_same_bytes(tmp_path):
  """At two random steps: SIGKILL, from which it goes on, and SIGTERM, at which it saves."""
  seed = time.time_ns()
  killed, told = sorted(random.Random(seed).sample(range(1, STEPS - 20), 2))
  print(f'seed {seed}: killed at step {killed}, told to end at step {told}')
  whole, workdir = tmp_path / 'whole', tmp_path / 'cut'
  finish(start(whole))

  process = start(workdir)
  reach(process, workdir, killed)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL

  process = start(workdir)
  reach(process, workdir, told)
  process.send_signal(signal.SIGTERM)
  out = finish(process)
  saved = checkpoint.steps(workdir)[-1]
  assert told <= saved < STEPS
  assert f'SIGTERM: saved at step {saved} of {STEPS}. The same command goes on from there.' in out
  assert not (workdir / 'result.json').exists()

  assert f'Going on from step {saved} of {STEPS}.' in finish(start(workdir))
  expected = final(whole)
  assert any('stream' in name or 'key' in name or 'count' in name for name in expected)
  assert final(workdir) == expected
  assert lines(workdir) == lines(whole)
