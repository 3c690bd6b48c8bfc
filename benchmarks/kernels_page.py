"""Writes the tables of docs/kernels.md from what was recorded.

    python -m benchmarks.kernels_page
"""

import json
import pathlib

from benchmarks import kernels

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'kernels.md'
TPU, GPU = (ROOT / 'tests' / 'aot' / f'{device}_budgets.json' for device in ('tpu', 'gpu'))
RESULTS = ROOT / 'benchmarks' / 'results'


UNTIMED = 'No kernel was timed on a GPU or a TPU yet: none was at hand. There is no figure to give.'


def tpu_table():
  """Bundles of a grid step by chip."""
  found = json.loads(TPU.read_text())
  chips = list(found)
  cases = list(found[chips[0]])
  head = ['product, rows', *chips]
  return table(head, [[f'`{case}`', *(str(found[chip][case]) for chip in chips)] for case in cases])


def gpu_table():
  """Issue slots of a step on sm_90a."""
  found = json.loads(GPU.read_text())
  return table(['product, rows', 'issue slots of a step'], [[f'`{case}`', str(slots)] for case, slots in found.items()])


def timed_tables():
  """One table a device whose results there are, and why what is not in it was not timed."""
  parts = []
  for path in sorted(RESULTS.glob('kernels_*.json')):
    found = json.loads(path.read_text())
    rows = [[p['name'], str(p['rows']), f'{p["k"]} x {p["n"]}', f'{p["microseconds"]:.1f}', f'{p["over_bfloat16"]:.2f}',
             kernels.over_peers(p) or '-', f'{100 * p["share_of_bandwidth"]:.0f} %',
             f'{100 * p["share_of_compute"]:.0f} %']
            for p in found['products'] if 'microseconds' in p]
    head = ['product', 'rows', 'k x n', 'us', 'times bfloat16', 'times peers', 'of the bandwidth', 'of the compute']
    parts.append(f'{found["device"]}, jax {found["jax"]}:\n\n{table(head, rows)}')
    if refused := not_timed(found['products']):
      parts.append('Not timed:\n\n' + table(['product', 'rows', 'why'], refused))
  return '\n\n'.join(parts) or UNTIMED


def not_timed(products):
  """[name, rows, why] of the products that were not, one for each reason."""
  found = {}
  for p in products:
    if 'not_timed' in p:
      found.setdefault((p['name'], p['not_timed'].replace('|', '/')), {})[p['rows']] = None
  return [[name, ', '.join(map(str, rows)), why] for (name, why), rows in found.items()]


def cpu_tables():
  """A token through a model, and single products, over float32."""
  found = json.loads((RESULTS / 'cpu_decode.json').read_text())
  token = [[r['model'], f'{r["ms"]:.1f}', f'{r["ratio"]:.2f}'] for r in found['rows']]
  rows = json.loads((RESULTS / 'cpu_matmul.json').read_text())['rows']
  names = list(dict.fromkeys(r['weight'] for r in rows))
  shapes = dict.fromkeys((r['rows'], r['inputs'], r['outputs']) for r in rows)
  ratio = {(r['rows'], r['inputs'], r['outputs'], r['weight']): f'{r["ratio"]:.2f}' for r in rows}
  products = [[f'{m} x {k} x {n}', *(ratio.get((m, k, n, name), '-') for name in names)] for m, k, n in shapes]
  return table(['one token', 'ms', 'times float32'], token) + '\n\n' + table(['rows x k x n', *names], products)


def table(head, rows):
  """Markdown."""
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  return '\n'.join([line(head), line(['---', *['---:'] * (len(head) - 1)]), *map(line, rows)])


TABLES = {'tpu': tpu_table, 'gpu': gpu_table, 'timed': timed_tables, 'cpu': cpu_tables}


def written(text):
  """`text` with each table between its <!-- name --> and <!-- end --> written anew."""
  for name, make in TABLES.items():
    before, rest = text.split(f'<!-- {name} -->\n')
    text = f'{before}<!-- {name} -->\n{make()}\n<!-- end -->' + rest.split('<!-- end -->', 1)[1]
  return text


if __name__ == '__main__':
  PAGE.write_text(written(PAGE.read_text()))
