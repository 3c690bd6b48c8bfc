r"""What low-bit products take on a GPU or TPU, over those of bfloat16 by XLA, in one run.

    python -m benchmarks.kernels [--out FILE] [--rounds N] [--shapes 4096x4096,8192x8192] [--rows 1,16,256]

Each measurement is a loop inside one program, over several weights in turn (more than a cache holds), whose input
depends on the output before it: nothing of the host or of a cache is in it. Rounds run every row once in alternating
order; a ratio is the median over rounds. Products of other packages (benchmarks/kernel_peers.py) are in the same
rounds: theirs is a ratio to their own framework's bfloat16, and ours one to theirs too. The roofline is measured in the
same run: the bandwidth of a copy, and the rate of a large bfloat16 product. Products are first compared with the
definition: a wrong one is not timed.
"""

import argparse
import json
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from benchmarks import kernel_peers, products
from qat.core import qarray
from qat.kernels import matmul, matmul_xla

SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336), (8192, 28672))
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)


def candidates(rows, k, n):
  """name -> Timed of one shape; what cannot run says why."""
  x = products.inputs(rows, k)
  found, refused = {'bfloat16': products.Timed(jnp.dot, x, products.weights(k, n, None))}, {}
  for name, spec in products.WEIGHTS.items():
    ws = products.weights(k, n, spec)
    found[f'{name}, XLA'] = products.Timed(matmul_xla.best, x, ws)
    if why := _unsupported(x, ws[0]):
      refused[name] = why
    else:
      found[name] = products.Timed(matmul.matmul, x, [matmul.prepare(w) for w in ws])
  for name, (of_x, of_w) in products.CODES.items():
    codes = qarray.encode(x.astype(jnp.float32), of_x)
    ws = products.weights(k, n, of_w)
    xla = _codes(matmul_xla.codes_by_codes, of_x)
    found[f'{name}, XLA'] = products.Timed(xla, x, ws, most_error=products.CODES_ERROR)
    if why := _unsupported(codes, ws[0]):
      refused[name] = why
    else:
      ws = [matmul.prepare(w, inputs=of_x) for w in ws]
      found[name] = products.Timed(_codes(matmul.matmul, of_x), x, ws, most_error=products.CODES_ERROR)
  return found, refused


def _unsupported(x, w):
  """Why no kernel of the default device multiplies x by w, or None."""
  device = jax.default_backend()
  return matmul.unavailable(device, x, w) or matmul.explain(x, w)[device]


def _codes(product, spec):
  """A product of codes, with the encoding of its input in it."""
  return lambda x, w: product(qarray.encode(x.astype(jnp.float32), spec), w)


def measure(rows, k, n, rounds, roofline):
  """The rows of the table of one shape."""
  found, refused = candidates(rows, k, n)
  found, wrong = products.checked(found)
  peers, missing = kernel_peers.candidates(rows, k, n)
  found |= peers
  took = {name: [] for name in found}
  for i in range(rounds):
    for name in sorted(found, reverse=i % 2):
      took[name].append(found[name]())
  lines = []
  for name, timed in found.items():
    time_s = statistics.median(took[name])
    read = timed.weight_bytes() + 2 * rows * (k + n)
    lines.append(dict(name=name, rows=rows, k=k, n=n, microseconds=1e6 * time_s,
                      over_bfloat16=ratio(took[timed.base], took[name]),
                      over_peers={peer: ratio(took[f'{peer} {name}'], took[name])
                                  for peer in kernel_peers.PACKAGES if f'{peer} {name}' in took},
                      share_of_bandwidth=read / time_s / roofline['bytes_per_second'],
                      share_of_compute=2 * rows * k * n / time_s / roofline['flops_per_second']))
  refused |= wrong | missing
  return lines + [dict(name=name, rows=rows, k=k, n=n, not_timed=why) for name, why in refused.items()]


def ratio(others, times):
  """How many times faster than the others: the median over rounds."""
  return statistics.median(b / a for a, b in zip(times, others))


def measure_roofline(size=8192, copied=2**29):
  """The bandwidth of a copy (reads and writes), and the rate of a product of bfloat16."""
  a = jnp.zeros(copied // 4, jnp.float32)
  copy = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda _, a: a + 1, a))
  x = jnp.ones((size, size), jnp.bfloat16)
  product = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: (y @ x).astype(x.dtype), x))
  best = lambda f, a: min(products.seconds(f, a) for _ in range(4))
  return dict(bytes_per_second=20 * 2 * copied / best(copy, a), flops_per_second=20 * 2 * size**3 / best(product, x))


def table(lines, device):
  shown = rich.table.Table(title=f'Low-bit products on {device}, over bfloat16 in the same run')
  for column in ('product', 'rows', 'k x n', 'us', 'x bfloat16', '% bandwidth', '% compute', 'x peers'):
    shown.add_column(column, justify='left' if column == 'product' else 'right')
  for line in lines:
    about = line['name'], str(line['rows']), f'{line["k"]} x {line["n"]}'
    if 'not_timed' in line:
      shown.add_row(*about, line['not_timed'])
    else:
      shown.add_row(*about, f'{line["microseconds"]:.1f}', f'{line["over_bfloat16"]:.2f}',
                    f'{100 * line["share_of_bandwidth"]:.0f}', f'{100 * line["share_of_compute"]:.0f}',
                    over_peers(line))
  return shown


def over_peers(line):
  return ', '.join(f'{peer} {times:.2f}' for peer, times in line['over_peers'].items())


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, help='benchmarks/results/kernels_<device>.json if not given')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--rows', type=lambda s: [int(r) for r in s.split(',')], default=ROWS)
  parser.add_argument('--shapes', type=lambda s: [tuple(map(int, p.split('x'))) for p in s.split(',')], default=SHAPES)
  options = parser.parse_args(arguments)
  device = jax.devices()[0].device_kind
  if jax.default_backend() not in ('gpu', 'tpu') and options.shapes is SHAPES:
    sys.exit(f'The default device is {device}: these are the kernels of GPUs and TPUs. Run it on one, see '
             'benchmarks/cpu_matmul.py for CPUs, or name small --shapes.')
  small = max(max(s) for s in options.shapes) < 1024
  roofline = measure_roofline(256, 2**20) if small else measure_roofline()
  lines = []
  for k, n in options.shapes:
    for rows in options.rows:
      lines += measure(rows, k, n, options.rounds, roofline)
  rich.console.Console().print(table(lines, device))
  name = device.lower().replace(' ', '_')
  out = options.out or pathlib.Path(__file__).parent / 'results' / f'kernels_{name}.json'
  about = dict(device=device, jax=jax.__version__, rounds=options.rounds, roofline=roofline, seed=0)
  out.write_text(json.dumps(about | dict(products=lines), indent=1) + '\n')
  return lines


if __name__ == '__main__':
  main()
