"""What a walk has solved so far, on disk: `qat ptq` goes on from there when it is typed again.

    <workdir>/solved/checkpoints/<stage>/    as qat/run/checkpoint.py writes them
"""

import sys

import numpy as np

from qat.run import checkpoint


class Solved:
  """Keeps stages by their number; one that was damaged is solved again."""

  def __init__(self, workdir):
    self.folder = workdir / 'solved'
    self.checkpoints = checkpoint.Checkpoints(self.folder, score=lambda metrics: 0.0, keep=sys.maxsize)

  def save(self, index, arrays, facts):
    """Writes {name: array} and JSON-able facts, in the background."""
    self.checkpoints.save(index, {name: storable(x) for name, x in arrays.items()}, dict(facts=facts))

  def load(self, index):
    """(arrays, facts) of a stage, or None."""
    if index not in checkpoint.steps(self.folder):
      return None
    try:
      about = checkpoint.about(self.folder, index)
      arrays = {name: checkpoint.array_of(self.folder, index, name) for name in about['checksums']}
      wrong = [name for name, x in arrays.items() if checkpoint.checksum(x) != about['checksums'][name]]
      if wrong:
        raise checkpoint.Damaged(f'Stage {index} of {str(self.folder)!r} is damaged: {wrong[:4]} have other checksums '
                                 'than when they were written.')
      return arrays, about['facts']
    except checkpoint.Damaged as error:
      checkpoint.set_aside(self.folder, index, error)
      self.checkpoints.manager.reload()
      print(f'WARNING: stage {index} is solved again.', file=sys.stderr)
      return None

  def __enter__(self):
    self.checkpoints.__enter__()
    return self

  def __exit__(self, *_):
    self.checkpoints.__exit__()


def storable(x):
  """Codes of less than 8 bits as bytes: orbax has no uint4."""
  kinds = {'int2': np.int8, 'int4': np.int8, 'uint2': np.uint8, 'uint4': np.uint8}
  return x.astype(kinds.get(x.dtype.name, x.dtype))
