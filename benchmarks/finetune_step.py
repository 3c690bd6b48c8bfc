r"""What codes cost a fine-tuning step: QLoRA over LoRA on the same floats, in one interleaved run.

    make bench            or  python -m benchmarks.finetune_step [--out FILE] [--rounds N] [--bases nf4_dq ...]

The network, adapters, optimizer and sequences of configs/smollm2_qlora.py. Each round runs one step of every base, in
alternating order; a ratio is the median over rounds of a base's step over that of the floats in the same round.
"""

import argparse
import gc
import json
import pathlib
import platform
import statistics
import time

import jax
import rich.console
import rich.table

from benchmarks import train_step
from qat.run import adaptation
from qat.run import cli
from qat.run import config as configs
from qat.run import state as states

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'smollm2_qlora.py'
FLOAT, TARGET = 'float', 1.10
BASES = FLOAT, 'nf4_dq', 'w4a16_g32'


class Trainer:
  """Runs steps of a base and keeps the state between them."""

  def __init__(self, base, overrides=''):
    run = adaptation.run(configs.build(f'{CONFIG}:base={base}{overrides}'))
    self.step = states.train_step(run.skeleton, run.objective, run.tx)
    self.state, self.batch = run.state, next(adaptation.batches(run))

  def seconds(self, steps):
    """Of one step, over `steps`."""
    start = time.perf_counter()
    for _ in range(steps):
      self.state, values = self.step(self.state, self.batch)
    jax.block_until_ready((self.state, values))
    return (time.perf_counter() - start) / steps


def rows(times):
  """[{base, step_s, step_ratio}]."""
  ratio = lambda seconds: statistics.median(s / f for s, f in zip(seconds, times[FLOAT]))
  return [dict(base=base, step_s=statistics.median(seconds), step_ratio=ratio(seconds),
               step_target=None if base == FLOAT else TARGET) for base, seconds in times.items()]


def table(found, tokens):
  t = rich.table.Table(title=f'Fine-tuning step, {tokens}, {platform.machine()}, jax {jax.__version__}')
  for column in ('base', 'step s', 'step / float', 'target'):
    t.add_column(column, justify='left' if column == 'base' else 'right')
  for r in found:
    target = '-' if r['step_target'] is None else f'<= {r["step_target"]:.2f}'
    t.add_row(r['base'], f'{r["step_s"]:.3f}', f'{r["step_ratio"]:.3f}', target)
  return t


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('benchmarks/results/finetune_step.json'))
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--bases', nargs='*', default=list(BASES))
  parser.add_argument('--smoke', action='store_true', help='short sequences')
  args = parser.parse_args()
  cli.compilation_cache()
  trainers = {}
  for base in dict.fromkeys((FLOAT, *args.bases)):
    trainers[base] = Trainer(base, ',smoke' if args.smoke else '')
    gc.collect()
    trainers[base].seconds(1)  # Compiles; `measure` runs one more before it begins.
  times = train_step.measure(trainers, args.rounds, steps=1)
  found, shape = rows(times), trainers[FLOAT].batch['tokens'].shape
  rich.console.Console().print(table(found, f'{shape[0]} x {shape[1]} tokens'))
  args.out.parent.mkdir(parents=True, exist_ok=True)
  facts = dict(jax=jax.__version__, machine=platform.machine(), device=jax.devices()[0].device_kind, rounds=args.rounds,
               tokens=list(shape))
  args.out.write_text(json.dumps(dict(facts, rows=found), indent=1) + '\n')
  print(args.out)


if __name__ == '__main__':
  main()
