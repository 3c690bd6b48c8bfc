"""qat train through a launcher: a run that is preempted is started again by itself, and ends in the same bytes."""

import os
import pathlib
import signal
import threading

from launch import job as values
from launch import local
from qat.run import checkpoint
from tests.launch import sweeps

STEPS = 60
CONFIG = f'tests/run/tiny.py:quantizer=stochastic,steps={STEPS}'  # Its random rounding must go on as well.


def train(workdir):
  return values.Job(('python', '-m', 'qat.run.train', '--config', CONFIG, '--workdir', str(workdir)), str(workdir),
                    'result.json')


def final(workdir):
  """{name: bytes} of the last checkpoint."""
  names = checkpoint.about(workdir, STEPS)['checksums']
  return {name: checkpoint.array_of(workdir, STEPS, name).tobytes() for name in names}


def preempt(workdir, step):
  """Sends SIGTERM to the run when it has logged a step, as a cluster does that wants its machine back."""
  log = workdir / 'metrics.jsonl'
  sweeps.until(lambda: log.is_file() and f'"step": {step}, "split": "train"' in log.read_text())
  pid = (workdir / 'log.txt').read_text().split(']')[0].split()[-1]  # Of the line that launch/once.py wrote.
  os.kill(int(pid), signal.SIGTERM)


def test_preempted_and_restarted_to_the_same_bytes(tmp_path, monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  killer = threading.Thread(target=preempt, args=(cut, 10))
  killer.start()
  endings = local.launch([train(cut), train(whole)], values.Resources(workers=2))
  killer.join()
  assert {job.name: (e.status, e.code, e.starts) for job, e in endings.items()} == dict(
      cut=(values.Status.FINISHED, 0, 2), whole=(values.Status.FINISHED, 0, 1))
  log = (cut / 'log.txt').read_text()
  saved = log.split('SIGTERM: saved at step ')[1].split()[0]
  assert 10 <= int(saved) < STEPS and f'Going on from step {saved} of {STEPS}.' in log
  assert final(cut) == final(whole)
