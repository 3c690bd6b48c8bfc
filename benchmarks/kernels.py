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
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from qat.core import formats, qarray, specs
from qat.kernels import matmul, matmul_xla, prepared

SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336), (8192, 28672))
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
WEIGHTS = {
    'int4 g128': specs.integer(4, (128, 1)), 'NF4 g64': specs.kernel(specs.NF4), 'MXFP4': specs.kernel(specs.MXFP4),
    'int8': specs.integer(8, specs.CHANNEL)}
CODES = {'W8A8': (specs.integer(8, specs.TOKEN), specs.integer(8, specs.CHANNEL)),
         'FP8': tuple(qarray.Spec(formats.FP8_E4M3, block) for block in (specs.TOKEN, specs.CHANNEL))}
CACHE_BYTES = 2**28  # Weights that are read in turn take at least this much together.
MOST_ERROR = 2.0**-6  # Of a product, over the largest number in it.
CODES_ERROR = 16 * MOST_ERROR  # Where inputs are rounded too.


def weights(k, n, spec):
  """Copies of one weight, in codes (or bfloat16 where `spec` is None), made on the device."""
  def make(seed):
    w = jax.random.normal(jax.random.key(seed), (k, n), jnp.bfloat16)
    return w if spec is None else qarray.encode(w.astype(jnp.float32), spec)
  bits = 16 if spec is None else spec.format.bits
  copies = min(max(2, CACHE_BYTES * 8 // (k * n * bits)), 64)
  return [jax.jit(make)(i) for i in range(copies)]


def inputs(rows, k):
  return jax.random.normal(jax.random.key(1), (rows, k), jnp.bfloat16)


def loop(product, count):
  """A program that multiplies `count` times by each weight, every input made from the output before."""
  def run(x, ws):
    def turn(_, x):
      for w in ws:
        y = product(x, w)
        x = jnp.where(y[:1, :1] > jnp.inf, jnp.zeros_like(x), x)         # Never; the compiler does not know.
      return x
    return jax.lax.fori_loop(0, count, turn, x)
  return jax.jit(run)


def seconds(run, *args):
  start = time.perf_counter()
  jax.block_until_ready(run(*args))
  return time.perf_counter() - start


class Timed:
  """A product by each of several weights in turn, what defines it, and what it takes.

  Attributes:
    base: the name of the product that its time is a ratio to.
    w: what `ws` begins with, decoded or in codes of ours: x @ decode(w) is the definition.
  """
  base = 'bfloat16'
  run = None

  def __init__(self, product, x, ws, w=None, most_error=MOST_ERROR):
    self.product, self.x, self.ws, self.most_error = product, x, ws, most_error
    self.w = ws[0] if w is None else w

  def error(self):
    """How far the product is off what defines it, over the largest number in that."""
    w = self.w if isinstance(self.w, jax.Array) else matmul.decode(self.w, jnp.bfloat16)
    expected = jnp.dot(self.x, w, preferred_element_type=jnp.float32)
    return float(jnp.max(jnp.abs(self.first() - expected)) / jnp.max(jnp.abs(expected)))

  def first(self):
    """The product by the first weight: f32[m, n]."""
    return jax.jit(self.product)(self.x, self.ws[0]).astype(jnp.float32)

  def timer(self, count):
    """A function that multiplies `count` times by each weight, and gives the seconds that it took."""
    return functools.partial(seconds, loop(self.product, count), self.x, self.ws)

  def weight_bytes(self):
    return sum(a.size * prepared.bits(a.dtype) for a in jax.tree.leaves(self.ws[0])) / 8

  def start(self, target_seconds=0.05):
    """Compiles a loop that takes about so long."""
    once = self.timer(1)
    once()
    count = max(1, int(target_seconds / max(once(), 1e-6)))
    self.run, self.products = self.timer(count), count * len(self.ws)
    self.run()

  def __call__(self):
    """Seconds of one product."""
    if self.run is None:
      self.start()
    return self.run() / self.products


def candidates(rows, k, n):
  """name -> Timed of one shape; what cannot run says why."""
  x = inputs(rows, k)
  found, refused = {'bfloat16': Timed(jnp.dot, x, weights(k, n, None))}, {}
  for name, spec in WEIGHTS.items():
    ws = weights(k, n, spec)
    found[f'{name}, XLA'] = Timed(matmul_xla.best, x, ws)
    if why := _unsupported(x, ws[0]):
      refused[name] = why
    else:
      found[name] = Timed(matmul.matmul, x, [matmul.prepare(w) for w in ws])
  for name, (of_x, of_w) in CODES.items():
    codes = qarray.encode(x.astype(jnp.float32), of_x)
    ws = weights(k, n, of_w)
    found[f'{name}, XLA'] = Timed(_codes(matmul_xla.codes_by_codes, of_x), x, ws, most_error=CODES_ERROR)
    if why := _unsupported(codes, ws[0]):
      refused[name] = why
    else:
      ws = [matmul.prepare(w, inputs=of_x) for w in ws]
      found[name] = Timed(_codes(matmul.matmul, of_x), x, ws, most_error=CODES_ERROR)
  return found, refused


def _unsupported(x, w):
  """Why no kernel of the default device multiplies x by w, or None."""
  device = jax.default_backend()
  return matmul.unavailable(device, x, w) or matmul.explain(x, w)[device]


def _codes(product, spec):
  """A product of codes, with the encoding of its input in it."""
  return lambda x, w: product(qarray.encode(x.astype(jnp.float32), spec), w)


def checked(found):
  """Those that give what the definition gives, ready to be timed, and what is wrong with the others."""
  right, wrong = {}, {}
  for name, timed in found.items():
    if (error := timed.error()) < timed.most_error:
      timed.start()
      right[name] = timed
    else:
      wrong[name] = f'error {error:.3g}'
  return right, wrong


def measure(rows, k, n, rounds, roofline):
  """The rows of the table of one shape."""
  from benchmarks import kernel_peers  # It imports this file.
  found, refused = candidates(rows, k, n)
  found, wrong = checked(found)
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
  best = lambda f, a: min(seconds(f, a) for _ in range(4))
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
