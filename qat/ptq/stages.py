"""Stages: the parts of a model that are solved one after the other, found by tracing it.

Most networks have a chain: a list of blocks, each of which is called on what the one before returned. Blocks of the
chain are solved one at a time, with one block and its inputs in memory. Layers before and after the chain, and those
of a model that has none, are solved one by one, each on a pass through the model.
"""

import collections
import dataclasses

from flax import nnx
import jax

from qat.nn import calls, quantized, rules, weights


@dataclasses.dataclass(frozen=True)
class Stage:
  """What is solved together.

  Attributes:
    block: path of the module that is run; '' is the whole model.
    layers: paths of the sites that are solved, in the order of their first call.
  """
  block: str
  layers: tuple[str, ...]


def stages(model, apply, batch):
  """The Stages of a quantized model, in the order of its forward.

  Args:
    model: with quantizers; sites without a weight quantizer are not solved.
    apply: (model, batch) -> anything.
    batch: what calibration passes, or its shapes.
  """
  log = calls.trace(model, apply, batch)
  blocks = chain(log, model)
  called = list(dict.fromkeys(call.path for call in log))
  paths = [s.path for s in rules.sites(model) if _is_solved(s)]
  order = lambda path: called.index(_module_of(path, called)) if _module_of(path, called) in called else -1
  paths.sort(key=order)
  inside = {p: next((b for b in blocks if _within(p, b)), None) for p in paths}
  start = called.index(blocks[0]) if blocks else len(called)
  alone = [p for p in paths if inside[p] is None]
  before, after = [p for p in alone if order(p) < start], [p for p in alone if order(p) >= start]
  streamed = [Stage(b, tuple(p for p in paths if inside[p] == b)) for b in blocks]
  return [Stage('', (p,)) for p in before] + streamed + [Stage('', (p,)) for p in after]


def waves(block, apply, one, layers):
  """`layers` of a block in tuples of those that read one and the same array, in the order in which they are called.

  Those of a tuple cannot depend on each other: queries, keys and values; then what attention returns to; then the
  first layers of the ffn. Layers that are not called, as bare Params, are by themselves.
  """
  first, found = {}, {}
  for call in calls.trace(block, apply, one):
    first.setdefault(call.path, call)
  called = list(first)
  for path in sorted(layers, key=lambda p: called.index(p) if p in first else -1):
    call = first.get(path)
    found.setdefault(id(call.args[0]) if call is not None and call.args else path, []).append(path)
  return [tuple(wave) for wave in found.values()]


def chain(log, model):
  """Paths of the longest row of siblings of which each reads what the one before returned, or [].

  Each is called once, and all else that it is called with is the same for all. Of equals, the heaviest row.
  """
  count = collections.Counter(call.path for call in log)
  families = collections.defaultdict(list)
  for call in log:
    family, _, name = call.path.rpartition('/')
    if name.isdigit() and count[call.path] == 1:
      families[family].append(call)
  rows = [row for family in families.values() for row in _rows(family)]
  size = {path: sum(a.size for a in jax.tree.leaves(nnx.state(m, nnx.Param))) for path, m in quantized.walk(model)}
  best = max(rows, key=lambda row: sum(size[call.path] for call in row), default=[])
  return [call.path for call in best]


def _rows(family):
  """The runs of calls, of two or more, that hand their result on."""
  row, found = [], []
  for call in family:
    if row and not _follows(row[-1], call):
      found, row = found + [row], []
    row.append(call)
  return [row for row in found + [row] if len(row) > 1]


def _follows(first, second):
  """Whether `second` is called as `first` was, but on its result."""
  if not (first.args and second.args and second.args[0] is first.result):
    return False
  same = lambda a, b: a is b or (not isinstance(a, jax.Array) and not isinstance(b, jax.Array) and a == b)
  if len(first.args) != len(second.args) or set(first.kwargs) != set(second.kwargs):
    return False
  return (all(same(a, b) for a, b in zip(first.args[1:], second.args[1:]))
          and all(same(first.kwargs[k], second.kwargs[k]) for k in first.kwargs))


def _is_solved(site):
  q = quantized.of(site.module)
  if q is None or site.name is None or site.name not in vars(q.weights):
    return False
  return not isinstance(site.variable, weights.Codes)  # What is frozen is solved.


def _module_of(path, called):
  """The called module that holds a site: its own path, or that of a bare Param's module."""
  return path if path in called else path.rpartition('/')[0]


def _within(path, block):
  return path == block or path.startswith(f'{block}/')
