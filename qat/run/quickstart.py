"""Shows what training on the grid is worth: float, post-training and trained networks side by side.

    python -m qat.run.quickstart --config configs/quickstart.py --workdir <dir>

Every row is the mean over some seeds, which train as one program. Quantized rows are scored on
frozen codes. Leaves in workdir: config.json, result.json, report.html.
"""

import dataclasses
import itertools
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections as mlc
import numpy as np
import rich.box
import rich.console
import rich.table

from qat.nn import explain
from qat.nn import transform
from qat.run import build
from qat.run import config as configs
from qat.run import data
from qat.run import plots
from qat.run import provenance
from qat.run import report
from qat.run import state as states
from qat.run import workdirs


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table."""
  name: str
  accuracies: tuple          # one a seed, of the frozen codes where there are any
  bits_per_weight: float
  size_bytes: float
  same_outputs: bool | None  # Frozen outputs equal those of training, bit for bit; None for floats.
  seconds: float

  @property
  def mean(self):
    return float(np.mean(self.accuracies))

  @property
  def std(self):
    """The sample standard deviation."""
    return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


def main(config, workdir):
  """Trains, prints the table, writes the report."""
  began, origin = time.monotonic(), provenance.provenance()
  workdir = workdirs.begin(workdir, config)
  console = rich.console.Console()
  rows = []

  # ------------------------------------------------------------------------ float, and put on the grid afterwards
  source, _ = build.sources(config)
  with console.status('float'):
    start = time.monotonic()
    runs, floats, _ = train(config, {})
    rows.append(row('float', runs, floats, start))
  for name, recipe in config.post_training:
    with console.status(name):
      start = time.monotonic()
      quantized = [build.quantized(m, seeded(config, i, recipe), source) for i, m in enumerate(floats)]
      rows.append(row(name, runs, quantized, start))

  # ------------------------------------------------------------------------ trained on the grid
  for name, recipe in config.trained:
    with console.status(name):
      start = time.monotonic()
      runs, models, losses = train(config, recipe)
      rows.append(row(name, runs, models, start))

  # ------------------------------------------------------------------------ table, report
  console.print(printed(rows, config))
  result = dict(config=configs.plain(config), seed=config.seed, steps=config.total_steps,
                rows=[dict(dataclasses.asdict(r), mean=r.mean, std=r.std) for r in rows],
                wall_seconds=time.monotonic() - began, peak_memory_bytes=provenance.peak_memory_bytes(), **origin)
  provenance.save(workdir / 'result.json', result)
  page = write(workdir, result, rows, losses, models[0])
  print(f'{page}\n{workdir / "result.json"}', flush=True)


def seeded(config, i, recipe):
  """The config of seed number i under a recipe."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed += i
    config.recipe = mlc.ConfigDict(recipe)
  return config


def train(config, recipe):
  """Trains all seeds side by side: one compilation, one program.

  Returns:
    the Runs, the trained models, and the curve of seed 0 as lines of metrics.
  """
  runs = [build.run(seeded(config, i, recipe)) for i in range(config.seeds)]
  first = runs[0]
  state = jax.tree.map(lambda *x: jnp.stack(x), *[r.state for r in runs])            # [seeds, ...]
  rows = [batches(r) for r in runs]
  together = jax.tree.map(lambda *x: np.stack(x, axis=1), *rows)                     # [steps, seeds, b, ...]
  step = jax.vmap(states.train_step(first.skeleton, first.objective, first.tx))
  state, values = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(state, together)
  if not bool(state.finite.all()):
    raise ValueError(f'Recipe {recipe}: a loss was not finite. Lower optimizer.learning_rate.')
  models = [r.model(jax.tree.map(lambda x: x[i], state)) for i, r in enumerate(runs)]
  lines = [dict(step=i + 1, split='train', loss=float(v)) for i, v in enumerate(values['loss'][:, 0])]
  return runs, models, lines


def batches(run):
  """All the batches of a run: {key: [steps, b, ...]}."""
  c = run.config
  some = itertools.islice(data.batches(run.train, c.data.batch_size, seed=c.seed), c.total_steps)
  return jax.tree.map(lambda *x: np.stack(x), *some)


def row(name, runs, models, start):
  """Scores the models of one row, frozen if they are quantized."""
  scorer, about = runs[0].scorer, explain.explain(models[0])
  is_quantized = bool(explain.quantized_weights(models[0]))
  served = [transform.freeze(m) for m in models] if is_quantized else models
  same = None
  if is_quantized:
    same = all(scorer.differences(m, f)['frozen_equals_trained'] for m, f in zip(models, served))
  accuracies = tuple(scorer(m)['accuracy'] for m in served)
  return Row(name, accuracies, about.bits_per_weight, about.size_bytes, same, time.monotonic() - start)


def cells(row):
  """A row as text."""
  same = '' if row.same_outputs is None else 'yes' if row.same_outputs else 'NO'
  return (row.name, f'{100 * row.mean:.2f} ± {100 * row.std:.2f}', f'{row.bits_per_weight:.2f}',
          f'{row.size_bytes / 1024:.1f} KiB', same, f'{row.seconds:.0f} s')


HEAD = ('network', 'accuracy, %', 'bits', 'size', 'same', 'time')


def printed(rows, config):
  """The table for a terminal."""
  title = f'{config.data.name}, {config.total_steps} steps, {config.seeds} seeds'
  table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False)  # As wide as 80 columns allow.
  for i, name in enumerate(HEAD):
    table.add_column(name, justify='right' if i else 'left')
  for row in rows:
    table.add_row(*cells(row))
  return table


def write(workdir, result, rows, losses, model):
  """Writes report.html; the last model's layers are shown."""
  sections = {'Result': report.table(HEAD, [cells(r) for r in rows]),
              f'Training loss: {rows[-1].name}, seed {result["seed"]}': plots.curves(losses),
              **report.layers(model),
              'Provenance': report.provenance(result)}
  return report.write_page(workdir, f'Quickstart: {rows[-1].name} {100 * rows[-1].mean:.2f} %', sections)


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['quickstart', *sys.argv[1:]]))
