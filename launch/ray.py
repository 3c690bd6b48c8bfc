"""Jobs as tasks of a Ray cluster. https://docs.ray.io

    python -m launch.ray --workers 8 --gpus 1 [--option address=auto] [--dry_run] 'qat train ...'

With no address it starts a cluster on this machine. Nodes must share the folder that it is started in. Ray places each
job by its cpus, gpus and memory; a node that dies is a preemption, after which the job goes on elsewhere.
"""

import json
import os
import signal
import socket
import sys

from launch import cli
from launch import local
from launch import pool

OPTIONS = ('address', 'runtime_env', 'resources')  # Of ray.init, of ray.init, and of each task: dict(TPU=4).
KNOCK_SECONDS = 10


def launch(commands, resources, dry_run=False):
  """{Job: Ending}. Runs commands (str, words or Jobs) as Ray tasks, or prints them."""
  return pool.launch(Ray, commands, resources, dry_run)


def engine():
  """The package: imports are absolute, so that it is not this file."""
  try:
    import ray  # Here: the other launchers do without it.
  except ImportError as error:
    raise ImportError('launch.ray needs ray, which is not installed. Run: pip install ray, or use --launcher local.'
                      ) from error
  return ray


def asked(job, resources):
  """The options of a job's task."""
  r = resources
  found = dict(name=job.name, num_cpus=r.cpus, num_gpus=r.gpus, memory=int(r.memory_gb * 2**30) or None,
               resources=r.options.get('resources'), max_retries=0)  # The pool starts it again, and counts.
  return {k: v for k, v in found.items() if v is not None}


def knock(address):
  """Raises OSError when nobody listens at <host>:<port>: Ray itself would try for minutes."""
  host, _, port = address.removeprefix('ray://').rpartition(':')
  if port.isdigit():
    socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


class Ray(pool.Engine):
  """Ray tasks. A handle is an ObjectRef."""

  def __init__(self, resources):
    super().__init__(resources)
    resources.check_options('launch.ray', OPTIONS)
    self.joined = False

  def join(self):
    """Joins the cluster, or starts one here."""
    ray, r = engine(), self.resources
    address = r.options.get('address', os.environ.get('RAY_ADDRESS'))
    own = {} if address else dict(num_cpus=r.workers * r.cpus, num_gpus=r.workers * r.gpus, include_dashboard=False)
    try:
      knock(address or '')
      ray.init(address=address or 'local', runtime_env=r.options.get('runtime_env'), log_to_driver=False,
               logging_level='ERROR', **own)
    except (OSError, RuntimeError, ValueError) as error:
      raise OSError(f'Ray cluster {address or "local"!r} cannot be reached: {error} Start one with `ray start --head`, '
                    'give --option address=<host>:<port>, or leave it out for one on this machine.') from error
    self.joined = True

  def start(self, job):
    if not self.joined:
      self.join()

    def run(words, log, cwd):  # In here, for cloudpickle takes it along by value.
      import os
      import signal
      import subprocess
      import time
      words = [str(os.getpid()) if word is None else word for word in words]
      with open(log, 'ab') as file:
        process = subprocess.Popen(words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
      try:
        while process.poll() is None:  # Ray's way to cancel does not interrupt process.wait().
          time.sleep(0.1)
        return process.returncode
      except BaseException:  # Cancelled: the command saves first.
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise

    job.log.parent.mkdir(parents=True, exist_ok=True)
    task = engine().remote(run).options(**asked(job, self.resources))
    return task.remote(local.wrapped(job, parent=None), os.path.abspath(job.log), os.getcwd())

  def code(self, handle):
    ray = engine()
    if not ray.wait([handle], timeout=0)[0]:
      return None
    try:
      return ray.get(handle)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.TaskCancelledError,
            ray.exceptions.LocalRayletDiedError):
      return -signal.SIGTERM
    except ray.exceptions.RayError as error:
      if isinstance(getattr(error, 'cause', None), KeyboardInterrupt):  # How a task sees that it was cancelled.
        return -signal.SIGTERM
      print(f'launch.ray: {cli.paragraph(error)}', file=sys.stderr)
      return 1

  def stop(self, handle):
    engine().cancel(handle)

  def kill(self, handle):
    engine().cancel(handle, force=True)

  def close(self):
    if self.joined:
      engine().shutdown()

  def describe(self, jobs):
    return '\n'.join(f'ray.remote(run).options(**{json.dumps(asked(job, self.resources))}).remote({str(job)!r})'
                     for job in jobs)


if __name__ == '__main__':
  sys.exit(cli.main(launch, __doc__))
