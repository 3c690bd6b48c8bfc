"""What a run measures, a line of JSON a time, and the same as TensorBoard events.

Invariant: metrics.jsonl has each (step, split) once, in order, however often the run was
killed: going on from step N first drops what is later than N.
"""

import json
import os

import tensorboardX


class Metrics:
  """Appends to workdir/metrics.jsonl and to the TensorBoard events beside it."""

  def __init__(self, workdir, step):
    """`step` is that of the restored checkpoint, 0 for a new run."""
    path = workdir / 'metrics.jsonl'
    truncate(path, step)
    self.file = open(path, 'ab', buffering=0)  # A line is on its way to the disk as soon as it is written.
    self.board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=30)

  def write(self, step, split, values):
    """One line: {'step': step, 'split': split, **values}."""
    self.file.write((json.dumps(dict(step=step, split=split, **values)) + '\n').encode())
    for name, value in values.items():
      self.board.add_scalar(f'{split}/{name}', value, step)

  def sync(self):
    """Puts every line on the disk: a checkpoint must not be newer than its metrics."""
    os.fsync(self.file.fileno())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.file.close()
    self.board.close()


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
