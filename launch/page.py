"""sweep.html: what a study found, in one file that opens with no network.

Parallel coordinates (a line a run, an axis a setting), the metric against bits per weight with the Pareto front, how
much each setting matters (fANOVA: Hutter et al. ICML 2014, by optuna), and every run in a table.
"""

import base64
import collections
import html
import io
import math

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure

from launch import grid
from launch import job as values
from launch import study as studies

INK, ACCENT, SOFT, RULE = '#1f3044', '#c4561e', '#8fa9c4', '#dde5ee'
COLORS = matplotlib.colormaps['viridis']
LOG_FROM = 20     # Times the least value: from here on an axis is logarithmic.
MOST_TICKS, TICK_ROOM = 8, 0.06  # Of an axis of the parallel coordinates: how many, and how far apart.
REPEATS = 'seed'  # Runs that differ in this alone are repeats of one.
STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; color: #1f3044; background: white; }
body { max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9em; }
td, th { padding: 0.25em 0.8em; text-align: left; border-bottom: 1px solid #dde5ee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f7fa; padding: 1em; overflow-x: auto; font-size: 0.85em; }
'''


def write(folder, runs, metric, command, summary):
  """Writes folder/sweep.html; returns its path.

  Args:
    folder: of the study.
    runs: [study.Run].
    metric: the name of what is judged by.
    command: the sweep's own.
    summary: str, how many runs ended how.
  """
  scored = [(run, run.value(metric)) for run in runs]
  scored = [(run, value) for run, value in scored if value is not None and math.isfinite(value)]
  words = metric.replace('_', ' ')
  sections = {'Best': best(scored, metric), 'Settings and ' + words: parallel(scored, metric),
              f'{words.capitalize()} against bits per weight': bits(scored, metric),
              'What matters': importance(scored, metric), 'Runs': table(runs, metric),
              'Command': f'<pre>{html.escape(command)}</pre>'}
  title = html.escape(f'{folder.name}: {summary}')
  body = ''.join(f'<h2>{html.escape(heading)}</h2>\n{content}\n' for heading, content in sections.items())
  head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
  path = folder / 'sweep.html'
  studies.write(path, f'<!doctype html>\n<html lang="en">{head}\n<body><h1>{title}</h1>\n{body}</body></html>\n')
  return path


def settings(runs):
  """The keys whose values differ among runs, in their order."""
  keys = list(dict.fromkeys(key for run in runs for key in run.settings))
  return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def groups(scored):
  """{settings but the seed: [(Run, value)]}: the repeats of one setting."""
  found = collections.defaultdict(list)
  for run, value in scored:
    found[tuple((k, v) for k, v in run.settings.items() if grid.short(k) != REPEATS)].append((run, value))
  return dict(found)


def mean(row):
  """(mean, standard deviation or 0) of [(Run, value)]."""
  found = [value for _, value in row]
  center = sum(found) / len(found)
  return center, math.sqrt(sum((v - center) ** 2 for v in found) / (len(found) - 1)) if len(found) > 1 else 0.0


def best(scored, metric):
  """The setting with the best mean, in a sentence."""
  if not scored:
    return f'<p>No run has {html.escape(metric)} in its result.</p>'
  sign = 1 if studies.rises(metric) else -1
  key, row = max(groups(scored).items(), key=lambda item: sign * mean(item[1])[0])
  center, spread = mean(row)
  said = ', '.join(f'{grid.short(k)} {v}' for k, v in key) or 'all alike'
  many = f' ± {spread:.2g} over {len(row)} runs' if len(row) > 1 else ''
  text = html.escape(f'{said}: {metric} {center:.5g}{many}')
  return f'<p>{text} (<code>{html.escape(str(row[0][0].job))}</code>)</p>'


def figure(width, height):
  """(figure, axis) without a frame at top and right."""
  made = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
  axis = made.subplots()
  axis.spines[['top', 'right']].set_visible(False)
  return made, axis


def png(made):
  """A figure as an <img> tag."""
  buffer = io.BytesIO()
  made.savefig(buffer, format='png', dpi=110, bbox_inches='tight')
  return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def place(texts):
  """Where values stand on an axis from 0 to 1, and its ticks.

  Numbers are placed evenly, or by their logarithm where they span more than LOG_FROM times; others in their order.

  Returns:
    ([position of each], [(position, label)]).

  >>> place(['1e-4', '1e-2', '1e-3'])[0]
  [0.0, 1.0, 0.5]
  """
  numbers = [grid.number(text) for text in texts]
  distinct = list(dict.fromkeys(texts))
  if None in numbers:
    spread = {text: i / max(1, len(distinct) - 1) for i, text in enumerate(distinct)}
    return [spread[text] for text in texts], [(spread[text], text) for text in distinct]
  log = min(numbers) > 0 and max(numbers) > LOG_FROM * min(numbers)
  of = math.log if log else float
  low, high = of(min(numbers)), of(max(numbers))
  at = lambda x: (of(x) - low) / (high - low) if high > low else 0.5
  few = sorted(set(numbers)) if len(set(numbers)) <= MOST_TICKS else [min(numbers), max(numbers)]
  return [round(at(x), 9) for x in numbers], apart([(at(x), f'{x:.4g}') for x in few])


def apart(ticks):
  """Ticks, from low to high, without those whose labels would cover others; the ends stay.

  >>> apart([(0.0, 'a'), (0.01, 'b'), (0.5, 'c'), (0.99, 'd'), (1.0, 'e')])
  [(0.0, 'a'), (0.5, 'c'), (1.0, 'e')]
  """
  kept = ticks[:1]
  for tick in ticks[1:-1]:
    if tick[0] - kept[-1][0] >= TICK_ROOM and ticks[-1][0] - tick[0] >= TICK_ROOM:
      kept.append(tick)
  return kept + ticks[1:][-1:]


def parallel(scored, metric):
  """A line a run through an axis a setting, coloured by the metric, which has the last axis."""
  keys = settings([run for run, _ in scored])
  if len(scored) < 2 or not keys:
    return '<p>Fewer than two runs that differ have a result.</p>'
  columns = [place([run.settings.get(key, '') for run, _ in scored]) for key in keys]
  columns.append(place([f'{value:.6g}' for _, value in scored]))
  made = matplotlib.figure.Figure(figsize=(1.9 * len(columns) + 1.2, 4.2), layout='constrained')
  axis = made.subplots()
  low, high = min(v for _, v in scored), max(v for _, v in scored)
  norm = matplotlib.colors.Normalize(low, high if high > low else low + 1)
  for i, (_, value) in enumerate(scored):
    axis.plot(range(len(columns)), [at[i] for at, _ in columns], color=COLORS(norm(value)), linewidth=1.4, alpha=0.8)
  for x, (_, ticks) in enumerate(columns):
    axis.axvline(x, color=INK, linewidth=1)
    for y, label in ticks:
      axis.text(x - 0.04, y, label, ha='right', va='center', fontsize=9, color=INK,
                bbox=dict(facecolor='white', edgecolor='none', alpha=0.75, pad=0.8))
  axis.set_xticks(range(len(columns)), [grid.short(key) for key in keys] + [metric.replace('_', ' ')])
  axis.set(xlim=(-0.45, len(columns) - 0.9), ylim=(-0.06, 1.06), yticks=[])
  axis.spines[:].set_visible(False)
  axis.tick_params(length=0)
  made.colorbar(matplotlib.cm.ScalarMappable(norm, COLORS), ax=axis, label=metric.replace('_', ' '), pad=0.02)
  return png(made)


def front(points, rising):
  """The points that none of as few bits beats, by bits.

  >>> front([(2, 0.90), (3, 0.85), (4, 0.95), (8, 0.95)], rising=True)
  [(2, 0.9), (4, 0.95)]
  """
  found = []
  for bits, value in sorted(points, key=lambda p: (p[0], -p[1] if rising else p[1])):
    if not found or (value > found[-1][1] if rising else value < found[-1][1]):
      found.append((bits, value))
  return found


def bits(scored, metric):
  """The metric against bits: a point a setting, the mean of its repeats with their deviation, and the Pareto front."""
  points = []
  for row in groups(scored).values():
    width = row[0][0].result().get('bits_per_weight')
    if width is not None:
      points.append((width, *mean(row), len(row)))
  if not points:
    return '<p>No result tells its bits per weight.</p>'
  made, axis = figure(7.4, 4.2)
  many = max(n for *_, n in points) > 1
  label = f'mean ± standard deviation of up to {max(n for *_, n in points)} runs' if many else 'a run'
  axis.errorbar([p[0] for p in points], [p[1] for p in points], yerr=[p[2] for p in points] if many else None, fmt='o',
                color=SOFT, ecolor=SOFT, capsize=3, label=label)
  best = front([p[:2] for p in points], studies.rises(metric))
  axis.plot(*zip(*best), color=ACCENT, marker='o', linewidth=1.4, drawstyle='steps-post', label='Pareto front',
            zorder=3)
  axis.set(xlabel='bits per quantized weight, scales included', ylabel=metric.replace('_', ' '))
  axis.grid(axis='y', color=RULE, linewidth=0.8)
  axis.set_axisbelow(True)
  axis.legend(frameon=False)
  return png(made)


def importances(scored):
  """{key: share} of the settings, by fANOVA; raises ValueError with the reason when there are none."""
  try:
    import optuna
  except ImportError:
    raise ValueError('needs optuna, which is not installed: pip install optuna.') from None
  keys = settings([run for run, _ in scored])
  if len(scored) < 4 or not keys:
    raise ValueError('needs four runs and a setting that differs.')
  if len({value for _, value in scored}) == 1:
    raise ValueError('all runs came out alike.')
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  of = {key: [run.settings.get(key, '') for run, _ in scored] for key in keys}
  kinds = {key: _distribution(optuna, texts) for key, texts in of.items()}
  study = optuna.create_study(direction='minimize')
  for i, (_, value) in enumerate(scored):
    params = {key: of[key][i] if isinstance(kinds[key], optuna.distributions.CategoricalDistribution)
              else float(of[key][i]) for key in keys}
    study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=value))
  evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
  return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _distribution(optuna, texts):
  """Of some values: numbers between the least and the most, or choices."""
  numbers = [grid.number(text) for text in texts]
  if None in numbers:
    return optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(texts)))
  log = min(numbers) > 0 and max(numbers) > LOG_FROM * min(numbers)
  return optuna.distributions.FloatDistribution(min(numbers), max(numbers), log=log)


def importance(scored, metric):
  """A bar a setting: its share of the variance of the metric."""
  try:
    found = importances(scored)
  except ValueError as error:
    return f'<p>Not computed: {html.escape(str(error))}</p>'
  made, axis = figure(6.4, 0.9 + 0.45 * len(found))
  bars = axis.barh([grid.short(key) for key in found], list(found.values()), color=SOFT)
  axis.bar_label(bars, fmt='%.2f', padding=3)
  axis.invert_yaxis()
  axis.margins(x=0.12)
  axis.set(xlabel=f'share of the variance of {metric.replace("_", " ")} (fANOVA, {len(scored)} runs)')
  return png(made)


def table(runs, metric):
  """Every run: its settings, how it ended, what it scored."""
  keys = list(dict.fromkeys(key for run in runs for key in run.settings))
  names = ['status', metric.replace('_', ' '), 'bits a weight', 'seconds', 'starts', 'folder']
  lines = [''.join(f'<th>{html.escape(name)}</th>' for name in [*map(grid.short, keys), *names])]
  for run in runs:
    result = run.result()
    why = f': exit code {run.code}. {run.last_words()}' if run.status is values.Status.FAILED else ''
    cells = [run.settings.get(key, '') for key in keys]
    cells += [run.status.value + why, run.value(metric), result.get('bits_per_weight'), result.get('wall_seconds'),
              run.starts, run.workdir.name]
    lines.append(''.join(map(_cell, cells)))
  return '<table>' + ''.join(f'<tr>{line}</tr>\n' for line in lines) + '</table>'


def _cell(x):
  if isinstance(x, (int, float)) or (isinstance(x, str) and grid.number(x) is not None):
    return f'<td class=number>{x if isinstance(x, str) else format(x, ".5g")}</td>'
  return f'<td>{html.escape("" if x is None else x)}</td>'
