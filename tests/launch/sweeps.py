"""Sweeps of tests/launch/program.py as processes."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = 'tests/launch/config.py'
PROGRAM = 'python tests/launch/program.py'
SECONDS = 120


def arguments(folder, *argv):
  """Those of a sweep of the study 's' in a folder."""
  return ['--config', CONFIG, '--program', PROGRAM, '--folder', str(folder), '--study', 's', *argv]


def start(folder, *argv, **env):
  """The process of a sweep."""
  command = [sys.executable, '-m', 'launch.sweep', *arguments(folder, *argv)]
  return subprocess.Popen(command, cwd=ROOT, env=dict(os.environ, **env), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


def sweep(folder, *argv, **env):
  """(exit code, stdout, stderr) of a sweep."""
  process = start(folder, *argv, **env)
  out, err = process.communicate(timeout=SECONDS)
  return process.returncode, out, err


def killed_and_started_again(folder, count, *argv):
  """Ends a sweep by SIGKILL when `count` of its runs have ended; (how many had, *sweep(...)) of the same command."""
  process = start(folder, *argv)
  until(lambda: len(results(folder / 's')) >= count)
  process.kill()
  process.communicate()
  before = len(results(folder / 's'))
  ended = sweep(folder, *argv)
  assert ended[0] == 0, ended[2]
  check_ended_once(folder / 's', 12)
  return before, *ended


def until(condition):
  """Waits for a condition."""
  deadline = time.monotonic() + SECONDS
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def results(folder):
  """The workdirs that have a result."""
  return sorted(path.parent for path in pathlib.Path(folder).glob('*/result.json'))


def working(folder):
  """Whether a run is on its way."""
  return any(not (path.parent / 'result.json').exists() for path in pathlib.Path(folder).glob('*/state'))


def rows(folder):
  """sweep.csv."""
  with open(pathlib.Path(folder) / 'sweep.csv') as file:
    return list(csv.DictReader(file))


def about(folder):
  """sweep.json."""
  return json.loads((pathlib.Path(folder) / 'sweep.json').read_text())


def check_ended_once(folder, count):
  """Every run has ended, once, and never beside another process."""
  workdirs = results(folder)
  assert len(workdirs) == count
  for workdir in workdirs:
    assert len((workdir / 'ends').read_text().splitlines()) == 1
    steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert steps == sorted(set(steps))
    log = (workdir / 'log.txt').read_text()
    assert 'two processes' not in log and 'after its end' not in log
