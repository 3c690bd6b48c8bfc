"""Some jobs at once on any engine: starts them, restarts what was preempted, passes signals on.

An engine knows how to start one job, to ask whether it has ended, and to stop it; this file knows the rest, so that
workers, restarts, signals and exit codes mean the same everywhere.
"""

import abc
import os
import signal
import sys
import time

from launch import job as values

POLL_SECONDS = 0.1
GRACE_SECONDS = 60  # To finish a step and save.


class Engine(abc.ABC):
  """Where jobs run. `start` returns a handle, which the other methods take."""

  def __init__(self, resources):
    self.resources = resources

  @abc.abstractmethod
  def start(self, job):
    """Starts a job, or finds it running since before; returns its handle."""

  @abc.abstractmethod
  def code(self, handle):
    """The exit code, or None while it runs."""

  @abc.abstractmethod
  def stop(self, handle):
    """Asks it to save and to leave."""

  @abc.abstractmethod
  def kill(self, handle):
    """Ends it at once."""

  @abc.abstractmethod
  def describe(self, jobs):
    """What would be submitted, as text."""

  def close(self):  # noqa: B027 - most have nothing to let go of.
    """Lets go of the engine."""


class Stop:
  """True once SIGTERM or SIGINT has come; `twice` once a second one has."""

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.asked, self.twice = None, False

  def __enter__(self):
    self.before = {s: signal.signal(s, self._hear) for s in self.SIGNALS}
    return self

  def __exit__(self, *_):
    for s, handler in self.before.items():
      signal.signal(s, handler)

  def __bool__(self):
    return self.asked is not None

  def _hear(self, number, _):
    self.asked, self.twice = signal.Signals(number), bool(self)


class Pool:
  """Up to `resources.workers` jobs at once.

  Invariant: when it closes, nothing that it started runs on.
  """

  def __init__(self, engine, resources):
    self.engine, self.resources = engine, resources
    self.running, self.starts, self.leaving, self.refused, self.began = {}, {}, set(), [], False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  @property
  def free(self):
    return len(self.running) < self.resources.workers

  def submit(self, job):
    """Starts a job. An engine that took jobs before and refuses this one fails this one alone."""
    self.starts[job] = self.starts.get(job, 0) + 1
    try:
      self.running[job] = self.engine.start(job)
    except OSError as error:
      if not self.began:
        raise
      print(f'launch: {job.name} was not started. {" ".join(str(error).split())}', file=sys.stderr)
      self.refused.append((job, values.Ending(values.Status.FAILED, os.EX_TEMPFAIL, self.starts[job])))
    self.began = True

  def poll(self):
    """[(Job, Ending)] of those that have ended since; one that was preempted goes on instead, if it may."""
    ended, self.refused = self.refused, []
    for job, handle in list(self.running.items()):
      code = self.engine.code(handle)
      if code is None:
        continue
      del self.running[job]
      ending = values.Ending(values.judge(job, code), code, self.starts[job])
      preempted = ending.status is values.Status.STOPPED and job not in self.leaving
      if preempted and self.starts[job] <= self.resources.restarts:
        self.submit(job)
      else:
        ended.append((job, ending))
    return ended

  def stop(self, job):
    """Asks a job to leave; it is not restarted."""
    if job in self.running and job not in self.leaving:
      self.leaving.add(job)
      self.engine.stop(self.running[job])

  def close(self, stopped=False):
    """Stops what runs, waits for it, and kills what does not leave. Returns [(Job, Ending)]."""
    for job in list(self.running):
      self.stop(job)
    ended, until = [], time.monotonic() + GRACE_SECONDS
    while self.running or self.refused:
      if time.monotonic() > until or getattr(stopped, 'twice', False):
        for handle in self.running.values():
          self.engine.kill(handle)
      ended += self.poll()
      time.sleep(POLL_SECONDS)
    self.engine.close()
    return ended


def drive(pool, plan, stopped, look=lambda: None):
  """Runs what `plan` has until it has no more, or a signal comes; `look` is called at each turn. What a plan is:

    take() -> the next Job, which is then started, or None
    ended(job, ending)
    watch(pool), at each turn
  """
  while not stopped:
    while pool.free and not stopped and (job := plan.take()):
      pool.submit(job)
    ended = pool.poll()
    if not ended and not pool.running:
      break
    for done, ending in ended:
      plan.ended(done, ending)
    plan.watch(pool)
    look()
    time.sleep(POLL_SECONDS)
  for done, ending in pool.close(stopped):
    plan.ended(done, ending)


class Listed:
  """The plan of a list of jobs: one line on stdout for each that ends."""

  def __init__(self, jobs):
    self.waiting, self.endings, self.count = list(jobs), {}, len(jobs)

  def take(self):
    return self.waiting.pop(0) if self.waiting else None

  def ended(self, job, ending):
    self.endings[job] = ending
    again = f', started {ending.starts} times' if ending.starts > 1 else ''
    print(f'{len(self.endings)}/{self.count}  {ending.status.value}, exit code {ending.code}{again}  {job}  '
          f'{job.log}', flush=True)

  def watch(self, pool):
    pass


def launch(engine, commands, resources, dry_run):
  """Runs commands on an engine.

  Args:
    engine: a class.
    commands: each a str, a sequence of words, or a Job.
    resources: Resources.
    dry_run: whether to print what would be submitted instead.

  Returns:
    {Job: Ending}; empty after a dry run. Those that a signal kept from starting are not in it.
  """
  jobs = values.jobs(commands)
  engine = engine(resources)
  if dry_run:
    print(engine.describe(jobs))
    return {}
  plan = Listed(jobs)
  with Stop() as stopped, Pool(engine, resources) as pool:
    drive(pool, plan, stopped)
  if stopped:
    print(f'{stopped.asked.name}: passed on. {len(plan.endings)} of {len(jobs)} jobs were started and have ended; the '
          'same commands go on from there.', file=sys.stderr)
  return plan.endings


def exit_code(endings, count):
  """0: all of `count` finished; 1: not all."""
  return int(sum(e.status is values.Status.FINISHED for e in endings.values()) < count)
