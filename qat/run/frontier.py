"""Draws a metric against bits per weight for many runs: a page with a plot, the floats' line, and a table.

    python -m qat.run.frontier --folder <dir> [--metric perplexity] <workdir> <workdir> ...

Leaves report.html in `folder`, which stands alone. Runs are drawn together only if they were measured alike.
"""

import argparse
import collections
import dataclasses
import html
import json
import math
import pathlib
import sys

import matplotlib.figure
import matplotlib.ticker

from qat.run import errors
from qat.run import names
from qat.run import plots
from qat.run import report

# What a run was told about its calibration is no part of how it was measured.
FREE = ('calibration',)
# Of a falling axis: metrics of which more is better.
RISING = ('accuracy', 'same_top', 'recall', 'mrr', 'top_', 'cosine', 'sqnr')
COLORS = (plots.ACCENT, '#2a6fb0', '#3a8f5c', '#8a4fa3', '#b8860b', plots.INK, '#c2407a', '#5f6b76')
MARKERS = 'osD^vP*X'
LOG_FROM = 8  # Times the least value: from here on a linear axis hides the better runs.


@dataclasses.dataclass(frozen=True)
class Point:
  """One run.

  Attributes:
    name: of its workdir.
    method: what made it: 'gptq', 'lsq', 'float'.
    recipe: its grids, in a word.
    bits: per quantized weight, scales included.
    value: of the metric, and its standard error, if it was measured.
    float_value: the float network's, if the run measured it.
    seed: of the run.
  """
  name: str
  method: str
  recipe: str
  bits: float
  value: float
  error: float | None
  float_value: float | None
  seed: int | None


def read(workdir):
  """What workdir/result.json holds."""
  path = pathlib.Path(workdir) / 'result.json'
  if not path.is_file():
    raise ValueError(f'Workdir {str(workdir)!r} has no result.json: its run has not ended, or it is no workdir. '
                     'Run the same command again, or leave it out.')
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{str(path)!r} is not JSON: {error}. Run the command of that workdir again.') from error


def point(workdir, result, metric):
  """The Point of a result."""
  config, found = result.get('config', {}), result.get('metrics', {})
  if metric not in found or 'bits_per_weight' not in result:
    what = f'metric {metric!r}' if metric not in found else "'bits_per_weight'"
    there = found if metric not in found and found else result
    raise ValueError(f'The result of {str(workdir)!r} has no {what}; it has {sorted(there)}. '
                     f'{names.suggest(metric, there)}')
  recipe = config.get('recipe') or {}
  method = config.get('method', {}).get('name') or recipe.get('quantizer') or report.recipe_name(recipe)
  return Point(pathlib.Path(workdir).name, method if recipe else 'float', _grids(recipe), result['bits_per_weight'],
               found[metric], found.get(f'{metric}_error'), found.get(f'float_{metric}'), result.get('seed'))


def _grids(recipe):
  """A recipe in a word, or its rules' where it quantizes some layers only."""
  name = report.recipe_name(recipe)
  inner = {report.recipe_name(rule if isinstance(rule, dict) else dict(name=rule))
           for rule in recipe.get('rules', {}).values()}
  return ', '.join(sorted(inner)) if inner and name == 'float' else name


def protocol(result):
  """How a result was measured: {aspect: words}. Those of runs that are drawn together are equal."""
  config, about = result.get('config', {}), result.get('about')
  if about:
    return {name: words for name, words in about.items() if name not in FREE}
  data = config.get('data', {})
  return {name: json.dumps(value, sort_keys=True) for name, value in
          dict(objective=config.get('objective'), data=data.get('name'), test=data.get('test'),
               options=data.get('options')).items()}


def check_same(protocols):
  """Raises unless all of {workdir: protocol} are equal, naming what differs and where."""
  first, *others = protocols
  for other in others:
    a, b = protocols[first], protocols[other]
    differ = [f'{name}: {a.get(name, "(absent)")} there, {b.get(name, "(absent)")} here' for name in sorted({*a, *b})
              if a.get(name) != b.get(name)]
    if differ:
      raise ValueError(f'Runs {str(first)!r} and {str(other)!r} were measured differently, and cannot share an axis: '
                       f'{"; ".join(differ)}. Draw them on pages of their own.')


def write(workdirs, folder, metric='perplexity'):
  """Writes folder/report.html; returns its path.

  Args:
    workdirs: of runs that ended.
    folder: where the page goes; it is made if it is not there.
    metric: a name in the `metrics` of every result.
  """
  if not workdirs:
    raise ValueError('frontier was given no workdir: there is nothing to draw. Name one or more.')
  results = {str(workdir): read(workdir) for workdir in workdirs}
  points = [point(workdir, result, metric) for workdir, result in results.items()]
  protocols = {workdir: protocol(result) for workdir, result in results.items()}
  check_same(protocols)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  words = metric.replace('_', ' ')
  sections = {f'{words.capitalize()} against bits per weight': drawn(points, metric),
              'Runs': table(points, metric),
              'How it was measured': report.table(('', ''), list(next(iter(protocols.values())).items()))}
  return report.write_page(folder, f'{words.capitalize()} and bits: {len(points)} runs', sections)


def floats(points):
  """The float network's values: those that runs measured beside their own, and those of float runs."""
  beside = {p.float_value for p in points if p.float_value is not None}
  return sorted(beside | {p.value for p in points if p.method == 'float'})


def quantized(points):
  """{method: [Point], by bits} of the runs that quantize."""
  found = collections.defaultdict(list)
  for p in sorted(points, key=lambda p: (p.bits, p.value)):
    if p.method != 'float':
      found[p.method].append(p)
  return dict(sorted(found.items()))


def drawn(points, metric):
  """The plot as HTML: a line a method through the means of equal bits, and a line for the floats."""
  lines, base = quantized(points), [v for v in floats(points) if math.isfinite(v)]
  seen = [p.value for row in lines.values() for p in row if math.isfinite(p.value)] + base
  figure = matplotlib.figure.Figure(figsize=(8.2, 4.8), layout='constrained')
  axis = figure.subplots()
  for i, (method, row) in enumerate(lines.items()):
    shown = [p for p in row if math.isfinite(p.value)]
    color, marker = COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
    axis.plot([p.bits for p in shown], [p.value for p in shown], linestyle='', label=method, color=color,
              marker=marker, markersize=6.5, markeredgecolor='white')
    axis.plot([b for b, _ in means(shown)], [v for _, v in means(shown)], linewidth=1.4, alpha=0.75, color=color)
  for value in {report.text(v): v for v in base}.values():
    axis.axhline(value, color=plots.INK, linewidth=1, linestyle=(0, (5, 3)), label=f'float: {report.text(value)}')
  if min(seen, default=0) > 0 and max(seen) > LOG_FROM * min(seen):
    axis.set_yscale('log')
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: report.text(v)))
    axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axis.set(xlabel='bits per quantized weight, scales included', ylabel=metric.replace('_', ' '))
  axis.grid(axis='y', color='#dde5ee', linewidth=0.8)
  axis.set_axisbelow(True)
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  left_out = [p.name for row in lines.values() for p in row if not math.isfinite(p.value)]
  note = f'<p>Not drawn, for their {metric} is not finite: {html.escape(", ".join(left_out))}.</p>' if left_out else ''
  return plots.png(figure) + note


def means(points):
  """[(bits, mean value)] of points in the order of their bits: seeds of one grid make one."""
  groups = collections.defaultdict(list)
  for p in points:
    groups[round(p.bits, 3)].append(p)
  return [(row[0].bits, sum(p.value for p in row) / len(row)) for row in groups.values()]


def best(points, metric):
  """The Points that none of as few bits beats: the frontier."""
  sign = -1 if any(word in metric for word in RISING) else 1
  found, least = [], math.inf
  for p in sorted((p for row in quantized(points).values() for p in row), key=lambda p: (p.bits, sign * p.value)):
    if sign * p.value < least:
      found.append(p)
      least = sign * p.value
  return found


def table(points, metric):
  """Every run, by bits; those on the frontier are marked."""
  front = best(points, metric)
  head = ('run', 'method', 'grids', 'seed', 'bits', metric.replace('_', ' '), '+-', 'float', 'frontier')
  blank = lambda x: '' if x is None else x
  rows = [(p.name, p.method, p.recipe, blank(p.seed), round(p.bits, 4), p.value, blank(p.error), blank(p.float_value),
           'yes' if p in front else '') for p in sorted(points, key=lambda p: (p.bits, p.value))]
  return report.table(head, rows)


def main(argv=None):
  """The page of a command line. Returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--folder', required=True, help='where report.html goes')
  parser.add_argument('--metric', default='perplexity', help='a name in the metrics of every result.json')
  parser.add_argument('workdirs', nargs='+')
  args = parser.parse_args(argv)
  try:
    print(write(args.workdirs, args.folder, args.metric))
  except ValueError as error:
    print(f'qat frontier: {errors.paragraph(error) or error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
