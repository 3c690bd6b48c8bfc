r"""What a token costs on the CPU after 255 that are held in caches: frozen models over the float one, in one run.

    python -m benchmarks.cpu_decode [--out FILE] [--rounds N]

A decoder of SmolLM2-135M's shape (30 blocks of width 576), random weights, the blocks' matrices in codes and the tied
embedding in floats in all; `kv8` keeps keys and values in 8 bits. `prepared` is qat.prepare of the frozen model; `as it
is` decodes at each call, as training does. Rounds run each once, in alternating order; a ratio is the median over
rounds.
"""

import argparse
import json
import pathlib
import platform
import statistics

from flax import nnx
import jax
import jax.numpy as jnp
import rich.console
import rich.table

import qat
from benchmarks import cpu_matmul, train_step
from qat.models import decoder
from qat.nn import recipes

RECIPES = {'W4, groups of 32': 'w4a16_g32', 'W8A8': 'w8a8', 'W4A8': 'w4a8', 'W4A8 kv8': 'w4a8_kv8'}
FLOAT, TARGET, TOKENS = 'float32', 1.0, 256


def models():
  """name -> a model."""
  floats = decoder.llama(nnx.Rngs(0), vocab_size=49152, context_length=TOKENS, width=576, layers=30, heads=9,
                         kv_heads=3, ffn_width=1536)
  found = {FLOAT: floats}
  for name, recipe in RECIPES.items():
    frozen = qat.freeze(qat.quantize(floats, recipes.at(r'blocks/[\w/]+', recipes.get(recipe))))
    found |= {f'{name}, prepared': qat.prepare(frozen, 'cpu'), f'{name}, as it is': frozen}
  return found


def product(model):
  """A compiled reading of the last token that the caches have room for."""
  caches = model.caches(1, TOKENS)
  for cache in caches:
    cache.length[...] = jnp.int32(TOKENS - 1)
  graph, state = nnx.split((model, caches))

  def read(state, tokens):
    model, caches = nnx.merge(graph, state)
    return model(tokens, caches), nnx.state(caches)

  return cpu_matmul.Product(read, state, jnp.ones((1, 1), jnp.int32))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('benchmarks/results/cpu_decode.json'))
  parser.add_argument('--rounds', type=int, default=9)
  args = parser.parse_args()
  times = train_step.measure({name: product(model) for name, model in models().items()}, args.rounds, steps=3)
  table = rich.table.Table('model', 'ms a token', 'times float32', title=f'One token, {platform.machine()}')
  rows = []
  for name, seconds in times.items():
    ratio = statistics.median(s / f for s, f in zip(seconds, times[FLOAT]))
    rows.append(dict(model=name, ms=1e3 * statistics.median(seconds), ratio=ratio))
    table.add_row(name, f'{rows[-1]["ms"]:.1f}', f'{ratio:.2f}')
  rich.console.Console().print(table)
  facts = dict(jax=jax.__version__, machine=platform.machine(), rounds=args.rounds, target=TARGET)
  args.out.write_text(json.dumps(dict(facts, rows=rows), indent=1) + '\n')
  print(args.out)


if __name__ == '__main__':
  main()
