"""explain: every layer of a model, its quantizers and its bits, and what stays in floats and why."""

import dataclasses

from flax import nnx
import numpy as np

from qat.nn import quantized, rules, weights


@dataclasses.dataclass(frozen=True)
class Row:
  """One weight, or one float array.

  Attributes:
    path: of the layer or Param.
    kind: the layer's class.
    shape: of the weight.
    weight, input: what puts them on a grid; '-' for floats.
    bits_per_weight: with scales and zeros.
    size_bytes: packed; 0 where another row has the same array.
    note: why it is in floats, or what it shares.
  """
  path: str
  kind: str
  shape: tuple
  weight: str
  input: str
  bits_per_weight: float
  size_bytes: float
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Explanation:
  """Rows, and their sums. Prints as a table."""
  rows: tuple[Row, ...]

  @property
  def size_bytes(self):
    """Of all parameters, packed."""
    return sum(r.size_bytes for r in self.rows)

  @property
  def bits_per_weight(self):
    """Over the quantized weights; 32 if there are none."""
    quantized_rows = [r for r in self.rows if r.weight != '-' and r.size_bytes]
    count = sum(int(np.prod(r.shape)) for r in quantized_rows)
    return 8 * sum(r.size_bytes for r in quantized_rows) / count if count else 32.0

  def __str__(self):
    head = ('layer', 'kind', 'shape', 'weight', 'input', 'bits', 'bytes', 'note')
    cells = [head] + [(r.path, r.kind, 'x'.join(map(str, r.shape)), r.weight, r.input,
                       f'{r.bits_per_weight:.3f}', f'{r.size_bytes:,.0f}', r.note) for r in self.rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    total = f'{self.size_bytes:,.0f} bytes; {self.bits_per_weight:.3f} bits a quantized weight'
    return '\n'.join([*lines, total])


def explain(model):
  """The Explanation of a float, quantized or frozen model."""
  seen, rows = {}, []
  for site in rules.sites(model):
    rows.append(_attention_row(site) if site.kind == 'Attention' else _weight_row(site, seen))
  for path, module in quantized.walk(model):
    for name, variable in quantized.children(module):
      if isinstance(variable, nnx.Param) and id(variable) not in seen:
        array = variable.get_value()
        seen[id(variable)] = name
        note = 'no rule names it: gains, biases and vectors stay in floats'
        if '/' in name and array.ndim > 1:
          note = 'held by a plain list or dict: rules reach those of nnx.List and nnx.Dict'
        rows.append(Row(f'{path}/{name}'.lstrip('/'), 'Param', array.shape, '-', '-', 8 * array.dtype.itemsize,
                        array.nbytes, note))
  return Explanation(tuple(rows))


def _weight_row(site, seen):
  """The row of a layer's weight or of a bare Param."""
  q = quantized.of(site.module)
  weight = q and vars(q.weights).get(site.name)
  value = site.variable.get_value()
  inputs = _describe(q.input) if q and q.input is not None else '-'
  kind, path = site.kind.removeprefix('Quantized'), site.path
  note = f'the same array as {seen[id(site.variable)]}' if id(site.variable) in seen else ''
  shared = bool(note)
  seen.setdefault(id(site.variable), path)
  if not weight:
    note = note or 'no rule gives it a weight quantizer'
    size = 0 if shared else value.nbytes
    return Row(path, kind, value.shape, '-', inputs, 8 * value.dtype.itemsize, size, note)
  if isinstance(site.variable, weights.Decoded):
    size = 0 if shared else value.nbytes
    return Row(path, kind, value.shape, 'decoded', inputs, 8 * value.dtype.itemsize, size, note)
  is_frozen = isinstance(site.variable, weights.Codes)
  codes = value if is_frozen else weights.shapes(weight, site.variable)
  name = getattr(codes, 'layout', 'codes') if is_frozen else type(weight.quantizer).__name__
  size = 0 if shared else codes.nbits / 8
  return Row(path, kind, codes.shape, f'{name} {codes.spec}', inputs, codes.nbits / codes.size, size, note)


def _attention_row(site):
  q = quantized.of(site.module)
  scores = '-' if q is None or q.scores is None else _describe(q.scores.key)
  note = '' if scores != '-' else 'no rule gives it a quantizer of scores or of the cache'
  return Row(site.path, 'Attention', (), '-', scores, 0, 0, note)


def _describe(quantizer):
  return f'{type(quantizer).__name__} {quantizer.spec}'


def quantized_weights(model):
  """path -> (the float matrices or None if frozen, their QArray), f32[*lead, in, out]; each array once."""
  found, seen = {}, set()
  for site in rules.sites(model):
    q = quantized.of(site.module)
    weight = q and vars(q.weights).get(site.name)
    if weight and id(site.variable) not in seen:
      seen.add(id(site.variable))
      is_frozen = isinstance(site.variable, weights.Codes)
      w = None if is_frozen else weight.layout.to_matrix(site.variable.get_value())
      found[site.path] = (w, weight.encode(site.variable))
  return found
