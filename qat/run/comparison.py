"""Compares runs in one HTML page, which opens with no network.

    qat report runs/lsq_bits/*

Leaves report.html in the folder that all of them are in: a table of what differs in their configs and of what came out,
their learning curves, and each metric against bits per weight where they were measured alike.
"""

import html
import json
import math
import os
import pathlib

import matplotlib

from qat.run import config as configs
from qat.run import frontier
from qat.run import metrics
from qat.run import plots
from qat.run import report

MOST_LINES = 60     # Of one panel: more hide each other.
MOST_NAMES = 12     # Of a legend.
MOST_LETTERS = 40   # Of a cell.
LEGEND_COLUMNS, LEGEND_INCHES = 3, 0.18
COLORS = matplotlib.colormaps['tab20']


def main(*folders):
  """Writes the page of some workdirs; what is no folder is passed over, what has not ended is named."""
  runs = {path: None for path in map(pathlib.Path, folders) if path.is_dir()}
  for path in runs:
    runs[path] = frontier.read(path) if (path / 'result.json').is_file() else None
  ended = {path: result for path, result in runs.items() if result}
  if len(ended) < 2:
    raise ValueError(f'{len(ended)} of {len(folders)} folders have a result.json: there is nothing to compare. '
                     'Name the workdirs of two runs or more that have ended; of one: qat report --workdir <dir>.')
  print(write(ended, [path.name for path, result in runs.items() if not result]), flush=True)


def write(results, left_out=()):
  """Writes the page; returns its path.

  Args:
    results: {workdir: what its result.json holds}, two or more.
    left_out: names of runs that have not ended.
  """
  sections = {'Runs': table(results) + _note('Not ended', left_out),
              'Learning curves': curves({path.name: metrics.read(path) for path in results}), **bits(results)}
  folder = pathlib.Path(os.path.commonpath([path.absolute().parent for path in results]))
  return report.write_page(folder, f'{folder.name}: {len(results)} runs', sections)


def differing(results):
  """{leaf: [its value in each config]} of the leaves that are not the same in all."""
  absent = '(absent)'
  all_leaves = [dict(configs.leaves(result.get('config', {}))) for result in results.values()]
  names = list(dict.fromkeys(name for leaves in all_leaves for name in leaves))
  found = {name: [leaves.get(name, absent) for leaves in all_leaves] for name in names if name not in configs.FREE}
  return {name: row for name, row in found.items() if len({json.dumps(v, sort_keys=True) for v in row}) > 1}


def table(results):
  """A row a run: what differs in its config, and what came out."""
  differ = differing(results)
  scores = list(dict.fromkeys(name for result in results.values() for name in result['metrics']))
  facts = ('bits_per_weight', 'size_bytes', 'wall_seconds')
  head = ('run', *differ, *(name.replace('_', ' ') for name in (*scores, *facts)))
  rows = [(path.name, *(_cell(row[i]) for row in differ.values()), *(result['metrics'].get(n, '') for n in scores),
           *(result.get(n, '') for n in facts)) for i, (path, result) in enumerate(results.items())]
  return report.table(head, rows)


def _cell(value):
  """A leaf for a cell: numbers as they are, the rest as short text."""
  if isinstance(value, (int, float)):
    return value
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS - 1] + '…'


def curves(lines):
  """A panel a metric of the tests, and one for the loss in training: a line a run.

  Args:
    lines: {name of the run: [{'step', 'split', name: value}]}.
  """
  wanted = list(dict.fromkeys(('test', name) for rows in lines.values() for row in rows if row['split'] == 'test'
                              for name in row if name not in ('step', 'split', 'seconds')))
  wanted += [('train', 'loss')] if any('loss' in row and row['split'] == 'train' for rows in lines.values()
                                       for row in rows) else []
  if not wanted:
    return '<p>No metrics were written.</p>'
  figure, axes = plots.panels(len(wanted))
  shown = list(lines)[:MOST_LINES]
  for (split, name), axis in zip(wanted, axes):
    for i, run in enumerate(shown):
      points = [(row['step'], row[name]) for row in lines[run] if row['split'] == split and name in row]
      if points:
        axis.plot(*zip(*points), color=COLORS(i % COLORS.N), linewidth=1.2, alpha=0.8,
                  marker='o' if split == 'test' else None, markersize=3, label=run)
    axis.set(title=f'{split} {name.replace("_", " ")}', xlabel='step')
  if len(shown) <= MOST_NAMES:
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc='outside lower center', ncols=LEGEND_COLUMNS)
    figure.set_figheight(figure.get_figheight() + LEGEND_INCHES * -(-len(names) // LEGEND_COLUMNS))
  return plots.png(figure) + _note('Not drawn', list(lines)[MOST_LINES:])


def bits(results):
  """{heading: HTML}: each metric that all have, against bits per weight; or why there is none."""
  protocols = {str(path): frontier.protocol(result) for path, result in results.items()}
  try:
    frontier.check_same(protocols)
  except ValueError as error:
    return {'Bits per weight': f'<p>Not drawn. {html.escape(str(error))}</p>'}
  sections, shared = {}, set.intersection(*(set(result['metrics']) for result in results.values()))
  for metric in [name for name in next(iter(results.values()))['metrics'] if name in shared]:
    if all('bits_per_weight' in r and _is_number(r['metrics'][metric]) for r in results.values()):
      points = [frontier.point(path, result, metric) for path, result in results.items()]
      if frontier.quantized(points):
        sections[f'{metric.replace("_", " ").capitalize()} against bits per weight'] = frontier.drawn(points, metric)
  return sections | {'How it was measured': report.table(('', ''), list(next(iter(protocols.values())).items()))}


def _is_number(x):
  return isinstance(x, (int, float)) and math.isfinite(x)


def _note(what, names):
  """A paragraph that names runs, if there are any."""
  return f'<p>{what}: {html.escape(", ".join(names))}.</p>' if names else ''
