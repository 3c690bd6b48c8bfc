"""What is launched, on what, and how it ended: plain values that every engine shares."""

import dataclasses
import enum
import pathlib
import shlex
import signal

# Programs of qat that leave result.json in their workdir when, and only when, they have done everything.
LEAVE_RESULT = ('train', 'finetune', 'ptq', 'quickstart')
RESULT = 'result.json'
LOG = 'log.txt'
# Exit codes of a process that a signal ended, as Popen and as a shell write them. SIGKILL is what machines that are
# taken away send last, and what the kernel sends when memory runs out.
STOPPED_BY = tuple(code for s in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP)
                   for code in (-s, 128 + s))

LOST = int(signal.SIGABRT)  # Of one of qat's processes on many machines when another is gone (qat/run/hosts.py).


class Status(enum.Enum):
  """Where a job is."""
  WAITING = 'waiting'
  RUNNING = 'running'
  FINISHED = 'finished'
  PRUNED = 'pruned'    # A search saw that it would not be among the best.
  STOPPED = 'stopped'  # By a signal, and saved; the same command goes on.
  FAILED = 'failed'


@dataclasses.dataclass(frozen=True)
class Job:
  """A command as a person would type it.

  Attributes:
    argv: its words.
    workdir: a folder for its log and its lock.
    result: the file in `workdir` that is there when all is done; '': the exit code says so.
  """
  argv: tuple
  workdir: str
  result: str = ''

  def __str__(self):
    return shlex.join(self.argv)

  @property
  def name(self):
    return pathlib.Path(self.workdir).name

  @property
  def log(self):
    return pathlib.Path(self.workdir) / LOG

  def done(self):
    """Whether its result is there."""
    return bool(self.result) and (pathlib.Path(self.workdir) / self.result).is_file()


@dataclasses.dataclass(frozen=True)
class Resources:
  """What a job gets, and how many run at once.

  Attributes:
    workers: jobs at once.
    cpus, gpus, memory_gb, hours: of each job; 0 leaves it to the engine.
    restarts: how often a job that was stopped from outside goes on by itself.
    options: what only one engine knows, by its own names: dict(partition='gpu').
  """
  workers: int = 1
  cpus: int = 1
  gpus: int = 0
  memory_gb: float = 0
  hours: float = 24
  restarts: int = 3
  options: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in ('workers', 'cpus'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: it is a whole number of 1 or more. Give one.')

  def check_options(self, engine, known):
    """Raises at an option that `engine` does not have."""
    for name in self.options:
      if name not in known:
        hint = f'Choose among {", ".join(sorted(known))}.' if known else 'It has none at all: leave it out.'
        raise ValueError(f'Option {name!r}: {engine} has none of that name. {hint}')


@dataclasses.dataclass(frozen=True)
class Ending:
  """How a job ended.

  Attributes:
    status: FINISHED, FAILED or STOPPED.
    code: the exit code of its last start.
    starts: how often it was started.
  """
  status: Status
  code: int
  starts: int


def judge(job, code):
  """The Status of a job whose process ended with `code`.

  `qat train` ends with 0 when SIGTERM stopped it and it has saved; then its result is not there.
  """
  if code == 0:
    return Status.FINISHED if job.done() or not job.result else Status.STOPPED
  lost = bool(job.result) and code == LOST
  return Status.STOPPED if code in STOPPED_BY or lost else Status.FAILED


def jobs(commands, folder='runs/launched'):
  """Commands, each a str, a sequence of words or a Job, as Jobs.

  A command that names a --workdir keeps its log there; the others get a folder of `folder`.

  >>> job, = jobs(['qat train --config configs/digits.py --workdir /tmp/a'])
  >>> job.workdir, job.result
  ('/tmp/a', 'result.json')
  """
  found = []
  for i, command in enumerate(commands):
    if isinstance(command, Job):
      found.append(command)
      continue
    argv = tuple(shlex.split(command) if isinstance(command, str) else command)
    if not argv:
      raise ValueError(f'Command {i} is empty: there is nothing to run. Leave it out.')
    workdir = _workdir(argv)
    leaves = workdir is not None and any(program in argv[:4] for program in LEAVE_RESULT)
    found.append(Job(argv, workdir or f'{folder}/{i}', RESULT if leaves else ''))
  _check_apart(found)
  return found


def _workdir(argv):
  """The value of --workdir, or None."""
  for word, after in zip(argv, (*argv[1:], None)):
    if word == '--workdir':
      return after
    if word.startswith('--workdir='):
      return word.split('=', 1)[1]
  return None


def _check_apart(jobs):
  """Raises when two jobs work in one folder."""
  seen = {}
  for job in jobs:
    if job.workdir in seen:
      raise ValueError(f'Workdir {job.workdir!r} is that of two commands, {str(seen[job.workdir])!r} and {str(job)!r}, '
                       'which would write over each other. Give each its own.')
    seen[job.workdir] = job
