"""Which tensor of a file is which variable of a model: a table of rows, `Name(theirs, ours, change)`.

A table lists every variable that models of a family may have. Numbers of layers are written `{i}`:

    Name('model.layers.{i}.mlp.up_proj.weight', 'blocks/{i}/ffn/up/kernel', transposed)
"""

import collections.abc
import dataclasses
import functools
import re

import numpy as np


def unchanged(x):
  """As it is in the file."""
  return x


def transposed(x):
  """[out, in] -> [in, out], as kernels are here."""
  return x.T


def plus_one(x):
  """Gemma stores the scales of its norms less 1."""
  return x.astype(np.float32) + 1.0


def part(i, parts):
  """The `i`-th of equal parts of the last axis, where one tensor holds several variables.

  >>> part(1, 3)(np.arange(6))
  array([2, 3])
  """
  return lambda x: np.split(x, parts, axis=-1)[i]


@dataclasses.dataclass(frozen=True)
class Name:
  """One row.

  Attributes:
    theirs: the tensor's name in the file, with `{i}` where ours has one.
    ours: the path of the variable, '/' between its parts.
    change: what makes the variable's array of the tensor.
  """

  theirs: str
  ours: str
  change: collections.abc.Callable = unchanged

  def match(self, path):
    """The tensor that belongs to `path`, or None.

    >>> Name('layers.{i}.up.weight', 'blocks/{i}/up/kernel').match('blocks/11/up/kernel')
    'layers.11.up.weight'
    """
    found = _pattern(self.ours).fullmatch(path)
    return found and self.theirs.format(**found.groupdict())


@functools.cache
def _pattern(ours):
  return re.compile(re.sub(r'\\\{(\w)\\\}', r'(?P<\1>\\d+)', re.escape(ours)))


def find(table, path):
  """The first row of a table that matches a path, and the tensor's name: (Name, str)."""
  for row in table:
    if (theirs := row.match(path)) is not None:
      return row, theirs
  raise ValueError(
      f'Variable {path!r}: no row of the table of names is for it; the first are {[row.ours for row in table][:4]}. '
      'Add a row that says which tensor it is.')
