"""The pool, on an engine that is made up."""

import signal

import pytest

from launch import job as values
from launch import pool

Status = values.Status


class Scripted(pool.Engine):
  """Each start of a job takes the next of its codes; OSError in their place refuses it."""

  def __init__(self, resources, **codes):
    super().__init__(resources)
    self.codes, self.stopped, self.closed = {name: list(row) for name, row in codes.items()}, [], False

  def start(self, job):
    code = self.codes[job.name].pop(0)
    if code is OSError:
      raise OSError('the queue is full')
    return job.name, code

  def code(self, handle):
    return -signal.SIGTERM if handle[0] in self.stopped else handle[1]

  def stop(self, handle):
    self.stopped.append(handle[0])

  kill = stop

  def describe(self, jobs):
    return ''

  def close(self):
    self.closed = True


def run(restarts=3, workers=2, **codes):
  """{name: (status, code, starts)}."""
  resources = values.Resources(workers=workers, restarts=restarts)
  engine = Scripted(resources, **codes)
  plan = pool.Listed([values.Job((name,), name) for name in codes])
  pool.drive(pool.Pool(engine, resources), plan, stopped=False)
  assert engine.closed
  return {job.name: (e.status, e.code, e.starts) for job, e in plan.endings.items()}


def test_endings():
  assert run(a=[0], b=[1], c=[-15, 0], d=[143, -9, -9, -9]) == dict(
      a=(Status.FINISHED, 0, 1), b=(Status.FAILED, 1, 1), c=(Status.FINISHED, 0, 2), d=(Status.STOPPED, -9, 4))


def test_an_engine_that_refuses_a_job_later_fails_that_job_alone(capfd):
  assert run(workers=1, a=[0], b=[OSError], c=[0]) == dict(
      a=(Status.FINISHED, 0, 1), b=(Status.FAILED, 75, 1), c=(Status.FINISHED, 0, 1))  # 75: EX_TEMPFAIL, sysexits.h.
  assert 'b was not started. the queue is full' in capfd.readouterr().err


def test_an_engine_that_refuses_the_first_is_not_there():
  with pytest.raises(OSError, match='the queue is full'):
    run(a=[OSError], b=[0])


def test_closing_stops_what_runs_and_does_not_restart_it():
  resources = values.Resources()
  engine, job = Scripted(resources, a=[None]), values.Job(('a',), 'a')
  running = pool.Pool(engine, resources)
  running.submit(job)
  assert running.poll() == []
  (ended, ending), = running.close()
  assert ended == job and ending == values.Ending(Status.STOPPED, -signal.SIGTERM, 1)
