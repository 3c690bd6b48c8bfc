"""Jobs as processes of this machine.

    python -m launch.local [--workers 2] [--dry_run] 'qat train ...' 'qat train ...'

Each writes workdir/log.txt, holds a lock of its workdir, and ends with the launcher (launch/once.py). With `gpus`,
worker k sees GPUs k * gpus and on.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

from launch import cli
from launch import pool

ONCE = str(pathlib.Path(__file__).with_name('once.py'))


def launch(commands, resources, dry_run=False):
  """{Job: Ending}. Runs commands (str, words or Jobs) as processes of this machine, or prints them."""
  return pool.launch(Local, commands, resources, dry_run)


def wrapped(job, parent):
  """The words that run a job under its lock, as a child of the process `parent`."""
  return [sys.executable, '-I', ONCE, job.workdir, job.result, parent, *job.argv]


class Local(pool.Engine):
  """Processes. A handle is (Popen, the worker's number)."""

  OPTIONS = ()  # None of its own.

  def __init__(self, resources):
    super().__init__(resources)
    resources.check_options(f'launch.{type(self).__name__.lower()}', self.OPTIONS)
    self.idle = list(range(resources.workers))

  def words(self, job, worker):
    """What a job runs, on the worker of that number."""
    return job.argv

  def start(self, job):
    job.log.parent.mkdir(parents=True, exist_ok=True)
    worker = self.idle.pop(0)
    with open(job.log, 'ab') as log:  # A session of its own: Ctrl-C on the terminal reaches the launcher only.
      words = wrapped(dataclasses.replace(job, argv=self.words(job, worker)), str(os.getpid()))
      process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                 env=self.environment(worker), start_new_session=True)
    return process, worker

  def environment(self, worker):
    """The process's environment: this one's, and its GPUs."""
    gpus = self.resources.gpus
    if not gpus:
      return None
    return dict(os.environ, CUDA_VISIBLE_DEVICES=','.join(str(worker * gpus + i) for i in range(gpus)))

  def code(self, handle):
    process, worker = handle
    code = process.poll()
    if code is not None:
      self.idle.append(worker)
    return code

  def stop(self, handle):
    handle[0].send_signal(signal.SIGTERM)

  def kill(self, handle):
    if handle[0].poll() is None:
      os.killpg(handle[0].pid, signal.SIGKILL)

  def describe(self, jobs):
    return '\n'.join(f'{job}  >> {job.log} 2>&1' for job in jobs)


if __name__ == '__main__':
  sys.exit(cli.main(launch, __doc__))
