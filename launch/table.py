"""How far a sweep is: a live table with the time left on a terminal, a line at each change elsewhere."""

import collections
import sys
import time

import rich.console
import rich.live
import rich.table

from launch import grid
from launch import job as values

Status = values.Status
LINES_SECONDS = 30  # Between lines where there is no terminal.
TURN_SECONDS = 0.5
COLORS = {Status.WAITING: 'dim', Status.RUNNING: 'cyan', Status.FINISHED: 'green', Status.PRUNED: 'yellow',
          Status.STOPPED: 'yellow', Status.FAILED: 'red'}
# Rows that stay when the terminal is too low for all: these first.
FIRST = (Status.RUNNING, Status.FAILED, Status.STOPPED, Status.FINISHED, Status.PRUNED, Status.WAITING)
SPARE_ROWS = 8


class Table:
  """Shows a plan's runs while they go on; a context manager.

  `say` prints a line above the table.
  """

  def __init__(self, title, metric, console=None):
    self.title, self.metric = title, metric
    self.console = console or rich.console.Console()
    self.live = rich.live.Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
    self.began, self.first, self.shown = time.monotonic(), None, 0.0

  def __enter__(self):
    if self.live:
      self.live.start()
    return self

  def __exit__(self, *_):
    if self.live:
      self.live.stop()

  def say(self, text):
    self.console.print(text, highlight=False, markup=False, soft_wrap=True)
    sys.stdout.flush()

  def update(self, plan, now=False):
    """Shows how the runs of a plan stand, if it is time."""
    every = TURN_SECONDS if self.live else LINES_SECONDS
    if time.monotonic() - self.shown < every and not now:
      return
    self.shown = time.monotonic()
    work = sum(run.progress() for run in plan.runs)
    self.first = work if self.first is None else self.first
    left = eta(time.monotonic() - self.began, work - self.first, plan.total - work)
    line = summary(plan.runs, plan.total, left)
    if self.live:
      self.live.update(draw(plan.runs, self.metric, f'{self.title}: {line}', self.console.height), refresh=True)
    else:
      self.say(line)


def summary(runs, total, left):
  """'5/12 finished, 2 running, 1 failed, 3:20 left'."""
  count = collections.Counter(run.status for run in runs)
  said = [f'{count[Status.FINISHED]}/{total} finished']
  said += [f'{count[s]} {s.value}' for s in (Status.RUNNING, Status.PRUNED, Status.STOPPED, Status.FAILED) if count[s]]
  return ', '.join([*said, f'{left} left'] if count[Status.RUNNING] else said)


def eta(seconds, done, left):
  """The time left at the pace so far; work is counted in runs.

  >>> eta(seconds=60, done=2, left=4)
  '2:00'
  """
  if done <= 0:
    return '-:--'
  s = round(seconds / done * left)
  return f'{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}' if s >= 3600 else f'{s // 60}:{s % 60:02d}'


def draw(runs, metric, title, height=10**6):
  """A rich table of runs; when the terminal is low, of those that matter most.

  Args:
    runs: [study.Run].
    metric: the name of a column.
    title: str.
    height: of the terminal, in lines.
  """
  keys = list(dict.fromkeys(key for run in runs for key in run.settings))
  table = rich.table.Table(title=title, title_justify='left')
  for key in keys:
    table.add_column(grid.short(key), justify='right')
  for name in ('status', 'done', metric, 'bits a weight', 'seconds', 'starts'):
    table.add_column(name.replace('_', ' '), justify='left' if name == 'status' else 'right')
  most = max(3, height - SPARE_ROWS)
  chosen = sorted(range(len(runs)), key=lambda i: FIRST.index(runs[i].status))[:most]
  for i in sorted(chosen):
    run, result = runs[i], runs[i].result()
    color = COLORS[run.status]
    table.add_row(*(run.settings.get(key, '') for key in keys), f'[{color}]{run.status.value}[/]',
                  f'{run.progress():.0%}', number(result.get('metrics', {}).get(metric, _latest(run, metric))),
                  number(result.get('bits_per_weight')), number(result.get('wall_seconds')), str(run.starts or ''))
  if len(chosen) < len(runs):
    table.caption = f'{len(runs) - len(chosen)} more rows'
  return table


def number(x):
  return '' if x is None else f'{x:.4g}'


def _latest(run, metric):
  """A metric's last value in metrics.jsonl, or None."""
  return next((line[metric] for line in reversed(run.lines()) if metric in line and line.get('split') != 'train'), None)
