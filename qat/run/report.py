"""Writes report.html again from what a run left. One file, which opens with no network.

    qat report --workdir <dir>
    qat report experiments/<paper>     # the tables of a paper's page instead: qat/run/pages.py
    qat report <workdir> <workdir> ... # a page that compares runs: qat/run/comparison.py

Learning curves, each layer's bits and size, its SQNR, its weights on their grid, and where it all comes from.
"""

import html
import json
import sys

from qat.nn import explain
from qat.run import build
from qat.run import checkpoint
from qat.run import config as configs
from qat.run import metrics
from qat.run import plots

STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; color: #1f3044; background: white; }
body { max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9em; }
td, th { padding: 0.25em 0.8em; text-align: left; border-bottom: 1px solid #dde5ee; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f7fa; padding: 1em; overflow-x: auto; font-size: 0.85em; }
'''


def main(config, workdir):
  """Writes the page from result.json, metrics.jsonl and the last checkpoint."""
  configs.check_same(config, workdir)
  path = workdir / 'result.json'
  steps = checkpoint.steps(workdir)
  if not path.is_file() or not steps:
    raise ValueError(f'--workdir {str(workdir)!r} has no {"checkpoint" if path.is_file() else "result.json"}: '
                     'the run has not ended. Run the same qat train command again, and it goes on.')
  run = build.run(config)
  state, _ = checkpoint.read_part(workdir, steps[-1], run.state)
  print(write(workdir, json.loads(path.read_text()), run.model(state)))


def write(workdir, result, model):
  """Writes workdir/report.html; returns its path.

  Args:
    workdir: with metrics.jsonl.
    result: what result.json holds.
    model: the trained model, not frozen: the floats behind the grid are drawn.
  """
  sections = {'Result': table(('metric', 'value'), numbers(result)),
              'Learning curves': plots.curves(metrics.read(workdir)),
              **layers(model),
              'Provenance': provenance(result)}
  config = result['config']
  name = f'{config["model"]["name"]} on {config["data"]["name"]}, {recipe_name(config["recipe"])}'
  return write_page(workdir, f'{name}: {line(result)}', sections)


def provenance(result):
  """The whole of result.json."""
  return f'<pre>{html.escape(json.dumps(result, indent=2))}</pre>'


def layers(model):
  """The sections that show a model's layers."""
  about = explain.explain(model)
  head = ('layer', 'kind', 'shape', 'weight', 'input', 'bits', 'bytes', 'note')
  rows = [(r.path, r.kind, 'x'.join(map(str, r.shape)), r.weight, r.input, r.bits_per_weight, r.size_bytes, r.note)
          for r in about.rows]
  total = (f'<p>{about.size_bytes:,.0f} bytes in all; {about.bits_per_weight:.3f} bits a quantized weight, '
           'scales included.</p>')
  sections = {'Layers': table(head, rows) + total}
  weights = {path: pair for path, pair in explain.quantized_weights(model).items() if pair[0] is not None}
  if weights:  # Where there are codes only, there are no floats to compare with.
    sections |= {'SQNR': plots.sqnr(weights), 'Weights and the levels of their grid': plots.histograms(weights)}
  return sections


def write_page(workdir, title, sections):
  """Writes {heading: HTML} as workdir/report.html."""
  body = ''.join(f'<h2>{html.escape(heading)}</h2>\n{content}\n' for heading, content in sections.items())
  path, title = workdir / 'report.html', html.escape(title)
  head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
  metrics.write(path, f'<!doctype html>\n<html lang="en">{head}\n<body><h1>{title}</h1>\n{body}</body></html>\n')
  return path


def table(head, rows):
  """An HTML table; numbers stand to the right."""
  cell = lambda tag, x: f'<{tag}{" class=number" * isinstance(x, (int, float))}>{html.escape(text(x))}</{tag}>'
  lines = [''.join(cell('th', x) for x in head), *(''.join(cell('td', x) for x in row) for row in rows)]
  return '<table>' + ''.join(f'<tr>{line}</tr>\n' for line in lines) + '</table>'


def text(x):
  """A cell's text: 12,345 and 4.125."""
  if isinstance(x, bool) or not isinstance(x, (int, float)):
    return str(x)
  return f'{x:,.0f}' if float(x).is_integer() and abs(x) >= 1000 else f'{x:.5g}'


def numbers(result):
  """[(name, value)] of what was measured."""
  named = [(f'test {name}', v) for name, v in result['metrics'].items()]
  named += [(f'test {name}, frozen', v) for name, v in result.get('frozen_metrics', {}).items()]
  keys = ('bits_per_weight', 'size_bytes', 'frozen_equals_trained', 'largest_output_difference', 'same_prediction',
          'wall_seconds', 'peak_memory_bytes')
  return named + [(k.replace('_', ' '), result[k]) for k in keys if k in result]


def line(result):
  """The result in one line."""
  scores = ', '.join(f'{name.replace("_", " ")} {v:.4g}' for name, v in result['metrics'].items())
  return f'{scores}; {result["bits_per_weight"]:.4g} bits per weight, {result["size_bytes"]:,.0f} bytes'


def recipe_name(recipe):
  """A recipe in one word: its name, or 'lsq W2A2'."""
  if not recipe:
    return 'float'
  return recipe.get('name') or f'{recipe["quantizer"]} W{recipe["weight_bits"]}A{recipe["input_bits"]}'


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['report', *sys.argv[1:]]))
