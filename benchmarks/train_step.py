r"""What training on the grid costs: step and compile time of QAT over float, in one interleaved run.

    make bench            or  python -m benchmarks.train_step [--out FILE] [--rounds N] [--peers]

A decoder of 4 layers, width 256 (GPT form, vocabulary 65), batch 16 x 128, AdamW, every layer
quantized. Each round runs every recipe once, in alternating order; a ratio is the median over rounds of
the recipe's step over float's of the same round. Compile time is tracing and XLA, no cache, the median of COMPILES
rounds in turn.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import qat
from qat.models import decoder
from qat.nn import recipes

# Recipe -> the targets of the ratios (step, compile); None where there is none.
RECIPES = {
    'float': (None, None), 'w8a8': (1.03, 1.3), 'w4a16_g64': (1.03, 1.3), 'w4a4': (1.15, None),
    'w4a4_lsq': (None, None), 'mxfp4': (1.15, None)}
BATCH, LENGTH, VOCABULARY = 16, 128, 65
COMPILES = 5


def network(name):
  """The decoder under the recipe `name`, calibrated where it must be."""
  model = decoder.gpt(nnx.Rngs(0), vocab_size=VOCABULARY, context_length=LENGTH, width=256, layers=4, heads=4)
  if name == 'float':
    return model
  return qat.calibrate(qat.quantize(model, recipes.get(name)), [tokens()[:, :-1]])


def tokens():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1)), jnp.int32)


def trainer(model):
  """A compiled step, its state, and the seconds that compiling took."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  tx = optax.adamw(1e-3)

  def step(params, moments, rest, batch):
    def loss(params):
      logits = nnx.merge(graph, params, rest)(batch[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
    value, gradients = jax.value_and_grad(loss)(params)
    updates, moments = tx.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, value

  moments = tx.init(params)
  jax.clear_caches()
  start = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, rest, tokens()).compile()
  seconds = time.perf_counter() - start
  return Trainer(compiled, params, moments, rest), seconds


class Trainer:
  """Runs steps and keeps the state between them."""

  def __init__(self, compiled, params, moments, rest):
    self.compiled, self.params, self.moments, self.rest = compiled, params, moments, rest
    self.batch = tokens()

  def seconds(self, steps):
    """Of one step, over `steps`."""
    start = time.perf_counter()
    for _ in range(steps):
      self.params, self.moments, loss = self.compiled(self.params, self.moments, self.rest, self.batch)
    loss.block_until_ready()
    return (time.perf_counter() - start) / steps


def measure(trainers, rounds, steps=2):
  """name -> seconds a step in each round; the order turns around every round."""
  times = {name: [] for name in trainers}
  for t in trainers.values():
    t.seconds(1)
  for i in range(rounds):
    for name in list(trainers)[::1 if i % 2 else -1]:
      times[name].append(trainers[name].seconds(steps))
  return times


def table(rows):
  t = rich.table.Table(title=f'Training step, {BATCH} x {LENGTH} tokens, {platform.machine()}, jax {jax.__version__}')
  for column in ('recipe', 'step ms', 'step / float', 'target', 'compile s', 'compile / float', 'target'):
    t.add_column(column, justify='left' if column == 'recipe' else 'right')
  target = lambda v: '-' if v is None else f'<= {v}'
  for r in rows:
    t.add_row(r['recipe'], f'{r["step_ms"]:.1f}', f'{r["step_ratio"]:.3f}', target(r['step_target']),
              f'{r["compile_s"]:.1f}', f'{r["compile_ratio"]:.2f}', target(r['compile_target']))
  return t


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('benchmarks/results/train_step.json'))
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--recipes', nargs='*', default=list(RECIPES))
  parser.add_argument('--peers', action='store_true', help='qwix and torchao as well, where installed')
  args = parser.parse_args()
  jax.config.update('jax_enable_compilation_cache', False)
  trainers, compiles = {}, {name: [] for name in args.recipes}
  trainer(network('float'))  # The first compilation of a process pays for more than its own.
  for _ in range(COMPILES):
    for name in args.recipes:
      trainers[name], seconds = trainer(network(name))
      compiles[name].append(seconds)
  compile_s = {name: statistics.median(seconds) for name, seconds in compiles.items()}
  compile_ratio = {name: statistics.median(s / f for s, f in zip(seconds, compiles['float']))
                   for name, seconds in compiles.items()}
  if args.peers:
    from benchmarks import peers  # Needs PyTorch: `make bench-peers` installs it.
    trainers |= peers.trainers()
  times = measure(trainers, args.rounds)
  rows = []
  for name, seconds in times.items():
    base = times[peers.baseline(name) if args.peers else 'float']
    step_target, compile_target = RECIPES.get(name, (None, None))
    rows.append(dict(
        recipe=name, step_ms=1e3 * statistics.median(seconds),
        step_ratio=statistics.median(s / f for s, f in zip(seconds, base)),
        compile_s=compile_s.get(name, float('nan')),
        compile_ratio=compile_ratio.get(name, float('nan')),
        step_target=step_target, compile_target=compile_target))
  rich.console.Console().print(table(rows))
  args.out.parent.mkdir(parents=True, exist_ok=True)
  facts = dict(jax=jax.__version__, machine=platform.machine(), device=jax.devices()[0].device_kind, rounds=args.rounds)
  args.out.write_text(json.dumps(dict(facts, rows=rows), indent=1) + '\n')
  print(args.out)


if __name__ == '__main__':
  main()
