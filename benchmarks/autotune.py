r"""Chooses tiles: prunes candidates by their machine code, without a device; times the 8 that are left, on one.

    python -m benchmarks.autotune --static v6e --out shortlist.json     # anywhere, in the environment of make test-aot
    python -m benchmarks.autotune --shortlist shortlist.json            # on the device: writes qat/kernels/tuned/

The first ranks candidates by instructions (bundles on TPU, issue slots on GPU) over the whole product, and drops those
that spill or do not compile. The second times them beside the heuristic's tiles as benchmarks/kernels.py does, and
stores the fastest where it beats the heuristic by MARGIN. Without a shortlist, it times the first 8 that fit.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from benchmarks import kernels, products
from qat.core import qarray, specs
from qat.kernels import matmul_gpu, matmul_tpu, static_gpu, static_tpu, tiles_gpu, tuned

WEIGHTS = {'int4g128': specs.integer(4, (128, 1)), 'int4': specs.integer(4, specs.CHANNEL),
           'int8': specs.integer(8, specs.CHANNEL), 'nf4': specs.kernel(specs.NF4)}
TIMED, MARGIN, ROUNDS = 8, 1.03, 5
MODULES = {'gpu': (matmul_gpu, static_gpu), 'tpu': (matmul_tpu, static_tpu)}
CANDIDATES = {'gpu': tiles_gpu.candidates, 'tpu': matmul_tpu.candidates}


def case(name):
  """(function, shapes) of 'int4g128_16_4096_4096_16_1024_2048': weight, rows, k, n, and the fields of the tiles."""
  weight, target, *numbers = name.split('_')
  (rows, k, n), fields = map(int, numbers[:3]), map(int, numbers[3:])
  module, _ = MODULES[target]
  tiles = module.Tiles(*fields)
  return lambda x, w: module.matmul(x, w, tiles), shapes(module, weight, rows, k, n)


def shapes(module, weight, rows, k, n):
  """A bfloat16 input and a prepared weight, as shapes."""
  prepare = lambda w: module.prepare(qarray.encode(w, WEIGHTS[weight]))
  w = jax.eval_shape(prepare, jax.ShapeDtypeStruct((k, n), jnp.float32))
  return jax.ShapeDtypeStruct((rows, k), jnp.bfloat16), w


def __getattr__(name):
  """Cases by their names, for static_gpu and static_tpu."""
  if name.split('_')[0] not in WEIGHTS:
    raise AttributeError(name)
  return lambda: case(name)


def candidates(target, weight, rows, k, n):
  """Tiles that fit, the heuristic's first."""
  module, _ = MODULES[target]
  _, p = shapes(module, weight, rows, k, n)
  return CANDIDATES[target](rows, p)


def cost(target, tiles, report, k, n, rows):
  """Instructions over the whole product."""
  if target == 'tpu':
    return report.bundles * math.ceil(rows / tiles.rows) * math.ceil(n / tiles.outputs) * (k // tiles.inputs)
  return report.slots * math.ceil(rows / tiles.rows) * (n // tiles.columns) * (k // tiles.depth)


def prune(chip, weight, rows, k, n, most):
  """[(instructions, tiles)] of the candidates that compile and do not spill, the fewest first."""
  target = 'tpu' if chip in static_tpu.CHIPS else 'gpu'
  _, static = MODULES[target]
  found = []
  for tiles in candidates(target, weight, rows, k, n)[:most]:
    name = '_'.join(map(str, (weight, target, rows, k, n, *dataclasses.astuple(tiles))))
    report = static.compile(f'benchmarks.autotune:{name}', chip)
    print(tiles, report.error or cost(target, tiles, report, k, n, rows), flush=True)
    if report.error is None and not getattr(report, 'spill_bytes', 0):
      found.append((cost(target, tiles, report, k, n, rows), dataclasses.asdict(tiles)))
  return sorted(found, key=lambda pair: pair[0])


def tune(weight, rows, k, n, shortlist):
  """Times the candidates of one product and stores the fastest; the row, or None where the heuristic stays."""
  target, device = jax.default_backend(), jax.devices()[0].device_kind
  module, _ = MODULES[target]
  x = jax.random.normal(jax.random.key(1), (rows, k), jnp.bfloat16)
  ws = [module.prepare(w) for w in products.weights(k, n, WEIGHTS[weight])]
  first, *others = CANDIDATES[target](rows, ws[0])
  others = [module.Tiles(**tiles) for tiles in shortlist] or others
  timed = {tiles: products.Timed(lambda x, w, t=tiles: module.matmul(x, w, t), x, ws)
           for tiles in [first, *others][:TIMED]}
  took = {tiles: [] for tiles in timed}
  for _ in range(ROUNDS):
    for tiles, run in timed.items():
      took[tiles].append(run())
  best = min(took, key=lambda tiles: statistics.median(took[tiles]))
  ratio = statistics.median(a / b for a, b in zip(took[first], took[best]))
  if ratio < MARGIN:
    return None
  micro = lambda tiles: round(1e6 * statistics.median(took[tiles]), 2)
  row = tuned.key(x, ws[0]) | dict(tiles=dataclasses.asdict(best), microseconds=micro(best),
                                   heuristic_microseconds=micro(first), jax=jax.__version__)
  tuned.store(row, device)
  return row


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--static', choices=[*static_tpu.CHIPS, *static_gpu.TARGETS], help='rank for this chip, and stop')
  parser.add_argument('--shortlist', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('shortlist.json'))
  parser.add_argument('--most', type=int, default=24, help='candidates to compile')
  parser.add_argument('--weights', type=lambda s: s.split(','), default=list(WEIGHTS))
  parser.add_argument('--rows', type=lambda s: [int(r) for r in s.split(',')], default=[1, 16, 64, 256])
  parser.add_argument('--shapes', type=lambda s: [tuple(map(int, p.split('x'))) for p in s.split(',')],
                      default=kernels.SHAPES)
  options = parser.parse_args(arguments)
  products = [(w, r, k, n) for w in options.weights for r in options.rows for k, n in options.shapes]
  key = lambda product: ' '.join(map(str, product))
  if options.static:
    found = {key(p): [tiles for _, tiles in prune(options.static, *p, options.most)[:TIMED]] for p in products}
    options.out.write_text(json.dumps(found, indent=1) + '\n')
    return
  if jax.default_backend() not in MODULES:
    sys.exit(f'The default device is {jax.devices()[0].device_kind}: tiles are timed on a GPU or TPU. Rank them '
             'without one by --static v6e (or another chip).')
  shortlist = json.loads(options.shortlist.read_text()) if options.shortlist else {}
  shown = rich.table.Table('product', 'tiles', 'us', 'by the heuristic')
  for product in products:
    row = tune(*product, shortlist.get(key(product), []))
    cells = ('the heuristic', '', '') if row is None else (
        str(row['tiles']), str(row['microseconds']), str(row['heuristic_microseconds']))
    shown.add_row(key(product), *cells)
  rich.console.Console().print(shown)


if __name__ == '__main__':
  main()
