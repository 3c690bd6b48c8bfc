r"""Products by low-bit weights on the CPU over XLA's float32 product, in one interleaved run.

    python -m benchmarks.cpu_matmul [--out FILE] [--rounds N] [--rows 1 8 128] [--peers]

Each round runs every product, in alternating order; a ratio is the median over rounds of a product's time over that of
XLA's float32 in the same round. `decoded by XLA` is x @ decode(w) under jit, of the int4 weight. Inputs of W8A8 and
W4A8 are rounded in what is timed. `--peers` adds PyTorch's products, whose ratios are to the same float32.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from benchmarks import train_step
from qat.core import qarray, specs
from qat.kernels import matmul_cpu
from qat.kernels.cpu import library

FLOAT, TARGET = 'float32', 1.0
ROWS = 1, 8, 128
SHAPES = (576, 1536), (4096, 4096)  # SmolLM2-135M's MLP, and the attention of a model of 7B.
WEIGHTS = {'int4 g32': specs.integer(4, (32, 1)), 'int4 g128': specs.integer(4, (128, 1)),
           'NF4 g64': specs.kernel(specs.NF4), 'int8': specs.integer(8, specs.CHANNEL),
           'MXFP8': specs.kernel(specs.MXFP8)}
CODES = {'W8A8': specs.integer(8, specs.CHANNEL), 'W4A8': specs.integer(4, specs.CHANNEL)}
OPERATIONS = 1e8  # Of a round of one product, at least: some ms.


class Product:
  """A compiled product and its operands."""

  def __init__(self, f, *operands):
    self.f, self.operands = jax.jit(f), operands

  def seconds(self, steps):
    """Of one product, over `steps`."""
    start = time.perf_counter()
    for _ in range(steps):
      y = self.f(*self.operands)
    jax.block_until_ready(y)
    return (time.perf_counter() - start) / steps


def codes_by_codes(x, w):
  return matmul_cpu.matmul(qarray.encode(x, specs.integer(8, specs.TOKEN)), w)


def group(spec):
  """The inputs that share a scale; None for all."""
  return spec.block[0] if isinstance(spec.block, tuple) else spec.block.size


def products(m, k, n):
  """name -> Product. A grid whose groups do not divide k is left out."""
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((m, k), (k, n)))
  encode = jax.jit(qarray.encode, static_argnums=1)
  prepared = lambda spec: matmul_cpu.prepare(encode(w, spec))
  fits = {name: spec for name, spec in WEIGHTS.items() if k % (group(spec) or k) == 0}
  return ({FLOAT: Product(jnp.matmul, x, w)} |
          {name: Product(matmul_cpu.matmul, x, prepared(spec)) for name, spec in fits.items()} |
          {name: Product(codes_by_codes, x, prepared(spec)) for name, spec in CODES.items()} |
          {'decoded by XLA': Product(lambda x, q: x @ qarray.decode(q), x, encode(w, WEIGHTS['int4 g32']))})


def measure(m, k, n, rounds, peers):
  """[{rows, inputs, outputs, weight, ms, ratio}]."""
  found = products(m, k, n)
  if peers:
    from benchmarks import cpu_peers                                         # Needs PyTorch.
    found |= cpu_peers.products(m, k, n)
  steps = max(1, min(50, int(OPERATIONS / (m * k * n))))
  times = train_step.measure(found, rounds, steps)
  ratio = lambda seconds: statistics.median(s / f for s, f in zip(seconds, times[FLOAT]))
  return [dict(rows=m, inputs=k, outputs=n, weight=name, ms=1e3 * statistics.median(seconds), ratio=ratio(seconds))
          for name, seconds in times.items()]


def table(found):
  names = list(dict.fromkeys(r['weight'] for r in found))
  t = rich.table.Table(title=f'Time / float32, {platform.machine()}, {library.load()[-1]}, jax {jax.__version__}')
  for column in ('rows', 'k x n', *names):
    t.add_column(column, justify='right')
  for m, k, n in dict.fromkeys((r['rows'], r['inputs'], r['outputs']) for r in found):
    of = {r['weight']: r['ratio'] for r in found if (r['rows'], r['inputs'], r['outputs']) == (m, k, n)}
    t.add_row(str(m), f'{k} x {n}', *(f'{of[name]:.2f}' if name in of else '-' for name in names))
  return t


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('benchmarks/results/cpu_matmul.json'))
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--rows', nargs='*', type=int, default=ROWS)
  parser.add_argument('--peers', action='store_true', help="PyTorch's products as well, where installed")
  args = parser.parse_args()
  found = [row for k, n in SHAPES for m in args.rows for row in measure(m, k, n, args.rounds, args.peers)]
  rich.console.Console(width=160).print(table(found))
  args.out.parent.mkdir(parents=True, exist_ok=True)
  facts = dict(jax=jax.__version__, machine=platform.machine(), device=jax.devices()[0].device_kind,
               level=library.load()[-1], rounds=args.rounds, target=TARGET)
  args.out.write_text(json.dumps(dict(facts, rows=found), indent=1) + '\n')
  print(args.out)


if __name__ == '__main__':
  main()
