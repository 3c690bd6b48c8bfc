"""The pictures of a report, as PNG in data: URLs, so that the page needs no other file."""

import base64
import io
import math

import matplotlib.figure
import numpy as np

from qat.core import qarray

COLUMNS = 3
MOST_LEVELS = 32      # More lines than this would hide the histogram behind them.
INK, ACCENT, SOFT = '#1f3044', '#c4561e', '#8fa9c4'


def png(figure):
  """A figure as an <img> tag."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=110, bbox_inches='tight')
  return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def panels(count, width=4.2, height=2.9):
  """(figure, axes) of `count` panels, in rows."""
  columns = min(count, COLUMNS)
  rows = math.ceil(count / columns)
  figure = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes[count:]:
    axis.set_visible(False)
  for axis in axes:
    axis.spines[['top', 'right']].set_visible(False)
  return figure, axes[:count]


def curves(lines):
  """Every metric over the steps.

  Args:
    lines: [{'step', 'split', name: value}], as metrics.jsonl has them.
  """
  names = sorted({name for line in lines for name in line} - {'step', 'split', 'seconds'})
  if not names:
    return '<p>No metrics were written.</p>'
  figure, axes = panels(len(names))
  for name, axis in zip(names, axes):
    for split, color, marker in (('train', SOFT, None), ('test', ACCENT, 'o')):
      points = [(line['step'], line[name]) for line in lines if line['split'] == split and name in line]
      if points:
        axis.plot(*zip(*points), color=color, marker=marker, markersize=3, linewidth=1.2, label=split)
    axis.set(title=name.replace('_', ' '), xlabel='step')
    axis.legend(frameon=False, fontsize=8)
  return png(figure)


def sqnr(weights):
  """A bar a layer: how far the weights on the grid are from the floats they stand for.

  Args:
    weights: {path: (f32[*shape], QArray[*shape])}.
  """
  values = {path: sqnr_db(w, q) for path, (w, q) in weights.items()}
  figure = matplotlib.figure.Figure(figsize=(7, 0.8 + 0.3 * len(values)), layout='constrained')
  axis = figure.subplots()
  bars = axis.barh(list(values), list(values.values()), color=SOFT)
  axis.bar_label(bars, fmt='%.1f', padding=3)
  axis.invert_yaxis()
  axis.margins(x=0.12)
  axis.spines[['top', 'right']].set_visible(False)
  axis.set(xlabel='SQNR of the weights, dB', ylabel='')
  return png(figure)


def sqnr_db(w, q):
  """10 log10(sum w^2 / sum (w - decode(q))^2).

  >>> import jax.numpy as jnp
  >>> from qat.core import specs
  >>> w = jnp.array([[1.0], [0.4]])
  >>> round(sqnr_db(w, qarray.encode(w, specs.integer(2, (None, 1)))), 2)   # 0.4 becomes 0: 1.16 / 0.16
  8.6
  """
  w = np.asarray(w, np.float64)
  error = ((w - np.asarray(qarray.decode(q), np.float64)) ** 2).sum()
  return float(10 * np.log10((w ** 2).sum() / error)) if error else math.inf


def histograms(weights):
  """A panel a layer: its weights in units of their scale, and the levels of the grid."""
  figure, axes = panels(len(weights))
  for (path, (w, q)), axis in zip(weights.items(), axes):
    u = np.asarray(qarray.units(w, q.spec, q.scale, q.zero) if q.spec.block is not None else w).ravel()
    levels = np.array(q.spec.format.levels())
    few = len(levels) <= MOST_LEVELS
    low, high = min(u.min(), levels.min()) if few else u.min(), max(u.max(), levels.max()) if few else u.max()
    axis.hist(u, bins=80, range=(low, high), color=SOFT)
    inside = levels[(levels >= low) & (levels <= high)]
    if few:
      for level in inside:
        axis.axvline(level, color=ACCENT, linewidth=0.8, alpha=0.8)
    else:
      axis.plot(inside, np.zeros(len(inside)), '|', color=ACCENT, markersize=9, alpha=0.6)
    axis.set_title(f'{path}\n{q.spec.format}, {len(levels)} levels', fontsize=9)
    axis.set(xlabel='weight / scale', yticks=[])
  return png(figure)
