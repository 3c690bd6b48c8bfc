"""What a run measures, a line of JSON a time, and the same as TensorBoard events and in other trackers.

Invariant: metrics.jsonl has each (step, split) once, in order, however often the run was
killed: going on from step N first drops what is later than N.
"""

import json
import os

from qat.run import trackers


class Metrics:
  """Appends to workdir/metrics.jsonl, and tells the trackers."""

  def __init__(self, workdir, step, config=None):
    """`step` is that of the restored checkpoint, 0 for a new run; `config` may name `trackers`."""
    path = workdir / 'metrics.jsonl'
    truncate(path, step)
    wanted, about = (config.get('trackers', ()), json.loads(config.to_json_best_effort())) if config else ((), {})
    self.trackers = trackers.opened(wanted, workdir, step, about)
    self.file = open(path, 'ab', buffering=0)  # A line is on its way to the disk as soon as it is written.

  def write(self, step, split, values):
    """One line: {'step': step, 'split': split, **values}."""
    self.file.write((json.dumps(dict(step=step, split=split, **values)) + '\n').encode())
    for tracker in self.trackers:
      tracker.write(step, {f'{split}/{name}': value for name, value in values.items()})

  def sync(self):
    """Puts every line on the disk: a checkpoint must not be newer than its metrics."""
    os.fsync(self.file.fileno())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.file.close()
    for tracker in self.trackers:
      tracker.close()


class Silent:
  """What the other processes of a run have in the place of Metrics."""

  def write(self, step, split, values):
    pass

  def sync(self):
    pass

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


def read(workdir):
  """[{'step', 'split', ...}] of the whole lines of workdir/metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  if not path.is_file():
    return []
  lines = []
  for line in path.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except ValueError:  # A kill in the middle of a line: nothing whole comes after.
      break
  return lines


def truncate(path, step):
  """Keeps the whole lines up to `step`."""
  if not path.is_file():
    return
  kept = [line for line in read(path.parent) if line['step'] <= step]
  whole = ''.join(json.dumps(line) + '\n' for line in kept)
  if whole != path.read_text():
    write(path, whole)


def write(path, text):
  """Writes a file so that a reader sees the old one or the new one, never a part."""
  new = path.with_suffix(path.suffix + '.new')
  with open(new, 'w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)
