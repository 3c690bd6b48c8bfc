"""A study on disk: a folder a run, and what is known of each.

    runs/<study>/<settings>-<hash>/    the run's workdir: all that qat leaves there, and
        log.txt                        what it printed
        run.json                       settings, command, hash, and how it ended
    runs/<study>/sweep.json, sweep.csv, sweep.html

Invariant: a run is found again by the hash of its whole config, so that what has finished is never run twice, and a
config file that changes makes new runs.
"""

import csv
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import socket

from launch import grid
from launch import job as values
from launch import leaves

Status = values.Status
RUN, METRICS = 'run.json', 'metrics.jsonl'
RISING = ('accuracy', 'same_top', 'recall', 'mrr', 'top_', 'cosine', 'sqnr')  # Metrics of which more is better.


@dataclasses.dataclass
class Run:
  """One run of a study.

  Attributes:
    settings: {key: value as text}, of --set and --search.
    job: its command and folder.
    digest: of its config.
    config: as JSON holds it.
    status: where it is.
    code, starts: how its last launch ended.
    trial: its number in a search.
  """
  settings: dict
  job: values.Job
  digest: str
  config: dict
  status: Status = Status.WAITING
  code: int | None = None
  starts: int = 0
  trial: int | None = None

  @property
  def workdir(self):
    return pathlib.Path(self.job.workdir)

  def result(self):
    """result.json, or {}."""
    return read(self.workdir / values.RESULT)

  def value(self, metric):
    """The metric of its result, or None."""
    return self.result().get('metrics', {}).get(metric)

  def lines(self):
    """The whole lines of metrics.jsonl."""
    return lines(self.workdir / METRICS)

  def progress(self):
    """The part of its steps that is done, 0 to 1."""
    if self.status in (Status.FINISHED, Status.PRUNED):
      return 1.0
    total, done = self.config.get('total_steps'), self.lines()
    return min(1.0, done[-1].get('step', 0) / total) if total and done else 0.0

  def begins(self):
    """Notes that it is started."""
    self.status, self.starts = Status.RUNNING, self.starts + 1
    self.save()

  def ended(self, status, ending):
    """Notes how it ended."""
    self.status, self.code, self.starts = status, ending.code, self.starts + ending.starts - 1
    self.save()

  def save(self):
    """Writes run.json."""
    about = dict(settings=self.settings, command=str(self.job), hash=self.digest, status=self.status.value,
                 code=self.code, starts=self.starts, trial=self.trial)
    write(self.workdir / RUN, json.dumps(about, indent=2) + '\n')

  def last_words(self):
    """The last line of its log that has something to say."""
    try:
      said = self.job.log.read_text(errors='replace').strip().splitlines()
    except OSError:
      return ''
    return said[-1][-300:] if said else ''


class Study:
  """The folder of a study, and what all of its runs share."""

  def __init__(self, folder, program, config):
    self.folder, self.program, self.config = pathlib.Path(folder), tuple(program), config

  def run(self, settings):
    """The Run of some settings, as its folder tells of it."""
    config = leaves.resolved(self.config, settings)
    digest = grid.digest(self.program, config)
    workdir = next(iter(sorted(self.folder.glob(f'*-{digest}'))), self.folder / grid.folder(settings, digest))
    argv = grid.command(self.program, self.config, settings, workdir)
    run = Run(settings, values.Job(argv, str(workdir), values.RESULT), digest, config)
    before = read(workdir / RUN)
    run.code, run.starts, run.trial = before.get('code'), before.get('starts', 0), before.get('trial')
    if run.job.done():
      run.status = Status.FINISHED
    elif before.get('status') == Status.PRUNED.value:
      run.status = Status.PRUNED
    return run

  def runs(self, combinations):
    """A Run for each settings; those whose configs are equal are one."""
    found = {}
    for settings in combinations:
      run = self.run(settings)
      found.setdefault(run.digest, run)
    return list(found.values())

  def hold(self):
    """Locks the study for this process and this machine. Returns the lock, which lasts until the process ends."""
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / f'sweep.{socket.gethostname()}.lock'
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f'Study {str(self.folder)!r}: process {path.read_text().strip()} of this machine sweeps it '
                       'already. Wait for it, end it (kill -TERM), or choose another --study.') from None
    os.ftruncate(lock, 0)
    os.write(lock, f'{os.getpid()}\n'.encode())
    return lock


def read(path):
  """A JSON file, or {} while it is not there or not whole. Not to be written to."""
  found = _parsed(path)
  return found[0] if len(found) == 1 else {}


def lines(path):
  """[{'step', 'split', ...}] of a metrics.jsonl, as far as it is whole."""
  return _parsed(path)


def _parsed(path):
  """The JSON values in a file; none when it is not there."""
  try:
    stat = path.stat()
    return _cached(path, stat.st_mtime_ns, stat.st_size)
  except OSError:
    return []


@functools.lru_cache(maxsize=4096)
def _cached(path, *_):
  """The same for a file of that age and size: tables read it at each turn."""
  text, found = path.read_text(), []
  try:
    return [json.loads(text)]
  except ValueError:
    pass
  for line in text.splitlines():
    try:
      found.append(json.loads(line))
    except ValueError:  # Being written, or cut by a kill: nothing whole comes after.
      break
  return found


def write(path, text):
  """Writes a file so that a reader sees the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix(path.suffix + '.new')
  new.write_text(text)
  os.replace(new, path)


def rises(metric):
  """Whether more of a metric is better."""
  return any(word in metric for word in RISING)


def row(run):
  """A run as one flat dict, for tables."""
  result = run.result()
  return dict({grid.short(key): value for key, value in run.settings.items()}, status=run.status.value,
              **result.get('metrics', {}), bits_per_weight=result.get('bits_per_weight'),
              size_bytes=result.get('size_bytes'), wall_seconds=result.get('wall_seconds'), starts=run.starts,
              exit_code=run.code, trial=run.trial, hash=run.digest, workdir=run.job.workdir, command=str(run.job))


def save(folder, runs, about):
  """Writes sweep.json and sweep.csv.

  Args:
    folder: of the study.
    runs: [Run].
    about: what else sweep.json holds.
  """
  rows = [row(run) for run in runs]
  write(folder / 'sweep.json', json.dumps(dict(about, runs=rows), indent=1) + '\n')
  head = list(dict.fromkeys(name for r in rows for name in r))
  with open(folder / 'sweep.csv', 'w', newline='') as file:
    out = csv.DictWriter(file, head)
    out.writeheader()
    out.writerows(rows)
