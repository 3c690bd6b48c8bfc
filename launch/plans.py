"""What a sweep does next: the runs of a grid, in order. Searches have plans of their own (launch/search.py)."""

from launch import job as values

Status = values.Status


class Grid:
  """The plan of a list of runs (launch/pool.py says what a plan is).

  Invariant: a run that has finished or was pruned is never started.
  """

  def __init__(self, runs, say):
    """`say` is called with a line of text at each change."""
    self.runs, self.say = list(runs), say
    self.waiting = [run for run in self.runs if run.status not in (Status.FINISHED, Status.PRUNED)]
    self.by_job = {run.job: run for run in self.runs}

  @property
  def total(self):
    return len(self.runs)

  def take(self):
    while self.waiting:
      run = self.waiting.pop(0)
      if run.job.done():  # Another machine was faster.
        run.status = Status.FINISHED
        continue
      run.begins()
      return run.job
    return None

  def ended(self, job, ending):
    run = self.by_job[job]
    run.ended(ending.status, ending)
    tell(run, self.say)

  def watch(self, pool):
    pass


def tell(run, say):
  """A line for a run that has ended; a failed one tells why, and where there is more."""
  name = run.workdir.name
  if run.status is Status.FAILED:
    say(f'{name}: failed with exit code {run.code}. {run.last_words()} The rest goes on; see {run.job.log}.')
  elif run.status is Status.STOPPED:
    say(f'{name}: stopped (exit code {run.code}). The same command goes on with it.')
  else:
    scores = ', '.join(f'{k} {v:.4g}' for k, v in run.result().get('metrics', {}).items())
    say(f'{name}: {run.status.value}{". " + scores if scores else ", as it fell behind."}')
