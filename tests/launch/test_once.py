"""The process that holds a workdir's lock, and then becomes the command."""

import os
import signal
import subprocess
import sys

from launch import local
from tests.launch import sweeps

def once(workdir, script, result='', parent=None):
  argv = [sys.executable, '-I', local.ONCE, str(workdir), result, str(os.getpid() if parent is None else parent), 'sh',
          '-c', script]
  return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_one_at_a_time_of_many(tmp_path):
  """Eight at once: each adds one to a number in a file, slowly."""
  (tmp_path / 'n').write_text('0')
  script = f'n=$(cat {tmp_path}/n); sleep 0.05; echo $((n + 1)) > {tmp_path}/n'
  many = [once(tmp_path, script) for _ in range(8)]
  assert [process.communicate() and process.returncode for process in many] == [0] * 8
  assert (tmp_path / 'n').read_text() == '8\n'


def test_who_waited_runs_only_if_the_result_is_not_there(tmp_path):
  script = f'sleep 0.2; echo x >> {tmp_path}/starts; touch {tmp_path}/result'
  many = [once(tmp_path, script, 'result') for _ in range(4)]
  said = [process.communicate()[0] for process in many]
  assert (tmp_path / 'starts').read_text() == 'x\n'
  assert sum('is there: nothing to do' in text for text in said) == 3


def test_the_lock_lasts_as_long_as_the_command_and_goes_with_a_kill(tmp_path):
  first = once(tmp_path, f'touch {tmp_path}/up; exec sleep 100')
  sweeps.until((tmp_path / 'up').exists)
  second = once(tmp_path, 'echo mine')
  first.kill()
  first.communicate()
  assert second.communicate()[0].splitlines()[-1] == 'mine'


def test_no_parent_no_run(tmp_path):
  """The parent ended before the kernel was asked to tell."""
  process = once(tmp_path, f'touch {tmp_path}/ran', parent=1)
  process.communicate()
  assert process.returncode == 128 + signal.SIGTERM and not (tmp_path / 'ran').exists()
