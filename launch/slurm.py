"""Jobs on a SLURM cluster, by submitit. https://github.com/facebookincubator/submitit

    python -m launch.slurm --workers 8 --gpus 1 --hours 4 --option partition=gpu [--dry_run] 'qat train ...'

    python -m launch.slurm --gpus 8 --option nodes=2 --option ntasks_per_node=8 'qat train ... --config.mesh.fsdp=16'

The second is one job of 16 processes, a GPU each: `qat train` and `qat finetune` find each other through SLURM.

Start it in a folder that the cluster shares. `--option cluster=local` runs the same on this machine, with no SLURM.
Each job is one sbatch job; SLURM's warning before it takes the node reaches the command as SIGTERM, upon which qat
saves, and the job is queued again. Jobs outlive the launcher: started again, it finds those that it left in the queue.
"""

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

from launch import cli
from launch import job as values
from launch import local
from launch import pool

CLUSTER = 'slurm'
TIMEOUTS = 1000       # How often SLURM may queue a job again: as often as it takes the node away.
SIGNAL_SECONDS = 120  # Before the node goes.
QUEUE_SECONDS = 10    # Between two questions to squeue about a job.


def launch(commands, resources, dry_run=False):
  """{Job: Ending}. Runs commands (str, words or Jobs) as SLURM jobs, or prints the sbatch scripts."""
  return pool.launch(Slurm, commands, resources, dry_run)


@functools.cache
def submitit():
  """The package."""
  try:
    import submitit  # Here: the other launchers do without it.
    import cloudpickle
  except ImportError as error:
    raise ImportError('launch.slurm needs submitit, which is not installed. Run: pip install submitit, or use '
                      '--launcher local.') from error
  cloudpickle.register_pickle_by_value(sys.modules[__name__])  # The node need not find this file.
  return submitit


class Task:
  """What a node runs: a command, whose exit code it returns. None among its words is the node's process id."""

  def __init__(self, argv, log, cwd, together=False):
    """`together`: whether it is one of several processes of one job."""
    self.argv, self.log, self.cwd, self.together = argv, log, cwd, together
    self.process = None

  def __call__(self):
    argv = [str(os.getpid()) if word is None else word for word in self.argv]
    env = dict(os.environ, LAUNCH_TASK=os.environ.get('SLURM_PROCID', '0')) if self.together else None
    with open(self.log, 'ab') as log:
      self.process = subprocess.Popen(argv, cwd=self.cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
      self.await_end()
    except BaseException:  # Interrupted: the command saves first.
      self.leave()
      raise
    return self.process.wait()

  def await_end(self):
    """Like process.wait(), which holds a lock that a signal's handler would wait for in vain."""
    os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

  def leave(self):
    """SIGTERM for the command, and time to save."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # It has ended already.
      os.kill(self.process.pid, signal.SIGTERM)
      self.await_end()

  def checkpoint(self):
    """submitit calls this when the node is taken away, and queues what it returns."""
    self.leave()
    from submitit import helpers  # Here: on the node there is no module around this class.
    return helpers.DelayedSubmission(Task(self.argv, self.log, self.cwd, self.together))


class Slurm(pool.Engine):
  """sbatch jobs. A handle is submitit's Job.

  Whether a job is alive is asked of squeue, which every cluster has: sacct, which submitit asks, needs accounting.
  """

  def __init__(self, resources):
    super().__init__(resources)
    self.options, self.ask_at = dict(resources.options), {}
    self.cluster = self.options.pop('cluster', CLUSTER)
    if self.cluster not in (CLUSTER, 'local'):
      raise ValueError(f'Option cluster={self.cluster!r}: there is none of that name. Choose among slurm, local.')
    known = submitit().slurm.slurm._get_default_parameters()
    resources.check_options('launch.slurm', {'cluster', *known})

  def start(self, job):
    folder = self.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    if there := self.find(job):
      return there
    try:
      executor = submitit().AutoExecutor(folder=folder, cluster=self.cluster, slurm_max_num_timeout=TIMEOUTS)
      executor.update_parameters(**self.parameters(job))
      task = Task(local.wrapped(job, parent=None), os.path.abspath(job.log), os.getcwd(), self.count > 1)
      submitted = executor.submit(task)
    except (RuntimeError, submitit().core.utils.FailedJobError, subprocess.SubprocessError) as error:
      raise OSError(f'SLURM took no job: {error} Start this on a machine of the cluster (which has sbatch and srun), '
                    'try --option cluster=local, or use --launcher local.') from error
    (folder / 'id').write_text(submitted.job_id)
    return submitted

  def folder(self, job):
    return pathlib.Path(job.workdir).absolute() / 'slurm'

  def find(self, job):
    """submitit's Job of a launcher before this one, while it waits or runs; else None."""
    path = self.folder(job) / 'id'
    if self.cluster != CLUSTER or not path.is_file():
      return None
    left = submitit().SlurmJob(folder=self.folder(job), job_id=path.read_text().strip(), tasks=list(range(self.count)))
    return left if queued(left.job_id) and not done(left) else None

  @property
  def count(self):
    """The processes of a job."""
    together = self.cluster == CLUSTER
    return int(self.options.get('nodes', 1)) * int(self.options.get('ntasks_per_node', 1)) if together else 1

  def parameters(self, job):
    """What submitit's executor is told."""
    r = self.resources
    told = dict(timeout_min=max(1, round(r.hours * 60)), cpus_per_task=r.cpus, gpus_per_node=r.gpus or None,
                mem_gb=r.memory_gb or None, name=job.name[:60])
    if self.cluster == CLUSTER:
      told |= {f'slurm_{name}': value for name, value in self.options.items()}
      told['slurm_signal_delay_s'] = self.options.get('signal_delay_s', SIGNAL_SECONDS)
    else:
      told.pop('mem_gb')
    return {name: value for name, value in told.items() if value is not None}

  def code(self, handle):
    if self.alive(handle):
      return None
    if not done(handle):
      return -signal.SIGTERM  # It went without a word: cancelled, or its node died.
    try:
      codes = [one.result() for one in processes(handle)]
      # Where one process fails, the others are lost: its code says more than theirs.
      return next((code for code in sorted(codes, key=lambda code: code == values.LOST) if code), 0)
    except submitit().core.utils.UncompletedJobError:
      return -signal.SIGTERM
    except Exception as error:  # What was raised in the node's Python, in kinds of submitit's own.
      print(f'launch.slurm: job {handle.job_id}: {cli.paragraph(error)[-300:]}', file=sys.stderr)
      return 1

  def alive(self, handle):
    """Whether a job waits or runs; asked of SLURM now and then only."""
    if self.cluster != CLUSTER:
      return not handle.done()
    if done(handle):
      return False
    now = time.monotonic()
    if now < self.ask_at.setdefault(handle.job_id, now + QUEUE_SECONDS):
      return True
    self.ask_at[handle.job_id] = now + QUEUE_SECONDS
    return queued(handle.job_id)

  def stop(self, handle):
    handle.cancel(check=False)

  kill = stop

  def describe(self, jobs):
    return '\n'.join(self.script(job) for job in jobs)

  def script(self, job):
    """The sbatch script of a job, with the command that a person would type in a comment."""
    convert = submitit().SlurmExecutor._equivalence_dict()
    told = {name.removeprefix('slurm_'): value for name, value in self.parameters(job).items()}
    told = {convert.get(name, name): value for name, value in told.items()}
    if 'mem' in told:
      told['mem'] = submitit().slurm.slurm._convert_mem(told['mem'])
    run = f'{sys.executable} -u -m submitit.core._submit {self.folder(job)}'
    text = submitit().slurm.slurm._make_sbatch_string(command=run, folder=self.folder(job), **told)
    return f'{text}\n# which runs: {job}\n# and writes: {job.log}\n'


def processes(handle):
  """A Job of submitit for each process of one."""
  return [handle.task(i) for i in range(handle.num_tasks)]


def done(handle):
  """Whether every process of a job has left what it returned."""
  return all(one.paths.result_pickle.exists() for one in processes(handle))


def queued(job_id):
  """Whether SLURM has a job in its queue, or does not answer now."""
  asked = subprocess.run(['squeue', '--noheader', '--format=%T', f'--jobs={job_id}'], capture_output=True, text=True)
  return bool(asked.stdout.strip()) if asked.returncode == 0 else 'Invalid job id' not in asked.stderr


if __name__ == '__main__':
  sys.exit(cli.main(launch, __doc__))
