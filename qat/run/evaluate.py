"""Evaluates what a run left: its best and its last checkpoint, as trained and frozen; or what qat merge left.

    qat evaluate --workdir <dir> [--config configs/<file>.py[:arg]]
    qat evaluate --workdir <dir>/merged/<name>

Prints a table; the config is the one that the run began with.
"""

import sys

import rich.console
import rich.table

from qat.nn import transform
from qat.run import adaptation
from qat.run import build
from qat.run import checkpoint
from qat.run import config as configs
from qat.run import errors
from qat.run import merged
from qat.run import published
from qat.run import scorer


def main(config, workdir):
  """Prints the table."""
  configs.check_same(config, workdir)
  if merged.is_merged(workdir):
    show(f'{workdir}, {config.data.name}', [evaluation(config, workdir)])
    return
  run = build.run(config)
  rows = list(evaluations(run, workdir))
  if not rows:
    raise ValueError(f'No checkpoint of {str(workdir)!r} is whole. Train again in another --workdir.')
  show(f'{workdir}, {config.data.name} {config.data.test}, {len(run.scorer.source)} examples', rows)


def show(title, rows):
  """Prints (which, step, form of the weights, {name: mean}) as a table."""
  table = rich.table.Table(title=title)
  for name in ('checkpoint', 'step', 'weights', *rows[0][-1]):
    table.add_column(name, justify='right')
  for *where, values in rows:
    table.add_row(*map(str, where), *(f'{v:.5g}' for v in values.values()))
  rich.console.Console().print(table)


def evaluation(config, workdir):
  """The row of a folder of `qat merge`, on the held-out texts of its fine-tuning."""
  network = published.load(workdir, config.dtype)
  _, test = adaptation.sources(config, network)
  score = scorer.Scorer(build.objective(config), test, config.eval.batch_size)
  return 'merged', config.total_steps, config.merged.into, score(network.model)


def evaluations(run, workdir):
  """Yields (which, step, form of the weights, {name: mean})."""
  last = max(checkpoint.steps(workdir), default=None)
  if last is None:
    raise ValueError(f'--workdir {str(workdir)!r} has no checkpoint to evaluate. Train there first: qat train.')
  best = checkpoint.best_step(workdir, run.objective.score)
  like = dict(params=run.state.params, rest=run.state.rest)
  for which, step in (('best', best), ('last', last)):
    if step is None:
      continue
    try:
      state, _ = checkpoint.read_part(workdir, step, like)
    except checkpoint.Damaged as error:
      print(f'WARNING: {errors.join(error)}', file=sys.stderr)
      continue
    model = run.skeleton.join(**state)
    yield which, step, 'float' if not run.config.recipe else 'trained', run.scorer(model)
    if run.config.recipe:
      yield which, step, 'frozen', run.scorer(transform.freeze(model))


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['evaluate', *sys.argv[1:]]))
