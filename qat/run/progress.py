"""How far a run is: a bar with the time left on a terminal, a line now and then elsewhere."""

import sys
import time

import rich.progress


def bar(total_steps, step, every_seconds):
  """The progress of a run from `step` to `total_steps`, as a context manager."""
  return Bar(total_steps, step) if sys.stdout.isatty() else Lines(total_steps, step, every_seconds)


class Bar:
  """A rich progress bar."""

  def __init__(self, total_steps, step):
    self.progress = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'), rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn('left'), rich.progress.TimeRemainingColumn())
    self.task = self.progress.add_task('training', total=total_steps, completed=step)

  def __enter__(self):
    self.progress.start()
    return self

  def __exit__(self, *_):
    self.progress.stop()

  def update(self, step, values):
    """Shows that `step` is done; `values` may be empty."""
    if values:
      self.progress.update(self.task, description=f'loss {values["loss"]:.4f}')  # More would leave no room for the bar.
    self.progress.update(self.task, completed=step)

  def say(self, text):
    """Prints a line above the bar."""
    self.progress.console.print(text, highlight=False)


class Lines:
  """A line every so many seconds."""

  def __init__(self, total_steps, step, every_seconds):
    self.total_steps, self.every_seconds = total_steps, every_seconds
    self.first, self.began = step, time.monotonic()
    self.said, self.values = self.began, {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def update(self, step, values):
    """Notes that `step` is done; `values` may be empty."""
    self.values = values or self.values
    now = time.monotonic()
    if now - self.said >= self.every_seconds or step == self.total_steps:
      self.said = now
      left = eta(now - self.began, step - self.first, self.total_steps - step)
      self.say(f'step {step}/{self.total_steps}  {_text(self.values)}  {left} left')

  def say(self, text):
    print(text, flush=True)


def eta(seconds, done, left):
  """The time left, at the pace so far.

  >>> eta(seconds=60, done=100, left=1000)
  '10:00'
  """
  s = round(seconds / max(done, 1) * left)
  return f'{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}' if s >= 3600 else f'{s // 60}:{s % 60:02d}'


def _text(values):
  return '  '.join(f'{name} {value:.4g}' for name, value in values.items())
