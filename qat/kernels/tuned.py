"""Tiles that were timed: a table a device in tuned/, which benchmarks/autotune.py writes; heuristics serve the rest.

A row holds for a kernel's layout, the dtypes, the group, up to `rows` rows (a power of two), and one shape of weight:

    {"layout": "gpu-sm90/1", "input": "bfloat16", "format": "INT4", "group": 128, "rows": 16, "k": 4096, "n": 4096,
     "tiles": {"rows": 16, "columns": 128, ...}, "microseconds": 9.1, "heuristic_microseconds": 10.4, "jax": "0.11.2"}
"""

import functools
import json
import pathlib
import re

import jax

from qat.core import qarray
from qat.kernels import groups

FOLDER = pathlib.Path(__file__).parent / 'tuned'
KEYS = ('layout', 'input', 'format', 'group', 'rows', 'k', 'n')


def path(device_kind, folder=FOLDER):
  """The table of a device: 'NVIDIA H100 80GB HBM3' -> tuned/nvidia_h100_80gb_hbm3.json."""
  return folder / (re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_') + '.json')


def key(x, p):
  """What a row is found by, for x[m, k], an array or a QArray, and a Prepared[k, n]."""
  kind = x.spec.format if isinstance(x, qarray.QArray) else jax.numpy.dtype(x.dtype).name
  return dict(layout=p.layout, input=str(kind), format=str(p.spec.format), group=groups.group_size(p.spec, p.shape),
              rows=bucket(x.shape[0]), k=p.shape[-2], n=p.shape[-1])


def bucket(rows):
  """The next power of two."""
  return 1 << max(rows - 1, 0).bit_length()


def find(x, p, make, device_kind=None, folder=FOLDER):
  """make(**tiles) of the row for x @ p on a device, or None.

  Args:
    x: [m, k].
    p: Prepared[k, n].
    make: the kernel's Tiles.
    device_kind: of this process' default device if not given.
  """
  device_kind = device_kind or jax.devices()[0].device_kind
  tiles = _table(path(device_kind, folder)).get(tuple(key(x, p).values()))
  return None if tiles is None else make(**tiles)


@functools.cache
def _table(path):
  """{values of KEYS: tiles}."""
  if not path.is_file():
    return {}
  return {tuple(row[k] for k in KEYS): row['tiles'] for row in json.loads(path.read_text())}


def store(row, device_kind, folder=FOLDER):
  """Puts a row into the table of a device, in place of the one of the same key."""
  file = path(device_kind, folder)
  rows = json.loads(file.read_text()) if file.is_file() else []
  same = lambda other: all(other[k] == row[k] for k in KEYS)
  rows = sorted([r for r in rows if not same(r)] + [row], key=lambda r: [str(r[k]).zfill(8) for k in KEYS])
  folder.mkdir(exist_ok=True)
  file.write_text('[' + ',\n '.join(map(json.dumps, rows)) + ']\n')
  _table.cache_clear()
