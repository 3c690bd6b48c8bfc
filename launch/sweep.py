"""Many runs of one config: a grid, a search, or a search at each point of a grid, on one machine or a cluster.

    python -m launch.sweep --config configs/mnist.py --study lsq_bits --set :bits=2,3,4 --set seed=0..4
    python -m launch.sweep --config configs/mnist.py --study lsq_rate --set :bits=2,4 \\
        --search optimizer.learning_rate=log:1e-4..1e-1 --trials 40 --pruner asha --workers 2

A key is a leaf of the config (seed, optimizer.learning_rate), or with a colon an argument of its file (:bits).
Everything is in runs/<study>/; typed again, the command goes on: what finished stays, what was interrupted goes on from
its last checkpoint, what failed is tried again. Exit codes: 0 all finished, 1 some did not, 2 wrong input, 130 and 143
stopped by a signal.
"""

import argparse
import importlib
import shlex
import sys

from launch import cli
from launch import grid
from launch import job as values
from launch import page
from launch import plans
from launch import pool
from launch import search
from launch import study as studies
from launch import table

LAUNCHERS = dict(local='Local', slurm='Slurm', ray='Ray', sky='Sky', tpu_pod='TpuPod')


def main(argv=None):
  """Runs a sweep. Returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  args = parser().parse_args(argv)
  try:
    return sweep(args, f'python -m launch.sweep {shlex.join(argv)}')
  except (ValueError, OSError, ImportError) as error:
    print(f'launch.sweep: {cli.paragraph(error)}', file=sys.stderr)
    return 2
  except Exception as error:
    if not search.is_storage(error):
      raise
    print(f'launch.sweep: the storage of trials was lost: {cli.paragraph(error)[:300]} What ran has saved; the same '
          'command goes on when it is back.', file=sys.stderr)
    return 2


def parser():
  """The flags."""
  p = argparse.ArgumentParser(prog='python -m launch.sweep', description=__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--config', required=True, help='configs/<file>.py[:arg]')
  p.add_argument('--study', required=True, help='the name of its folder')
  p.add_argument('--folder', default='runs', help='where the folder is')
  p.add_argument('--program', default='qat train', help='what runs the config')
  p.add_argument('--set', action='append', default=[], metavar='KEY=V,V or KEY=0..4', help='every value')
  p.add_argument('--search', action='append', default=[], metavar='KEY=[log:]LOW..HIGH or KEY=V,V')
  p.add_argument('--trials', type=int, default=20, help='of each search')
  p.add_argument('--metric', default='accuracy', help="a name in the metrics of result.json")
  p.add_argument('--sampler', choices=('tpe', 'random'), default='tpe')
  p.add_argument('--pruner', choices=('none', 'asha', 'hyperband', 'median'), default='none')
  p.add_argument('--storage', help='sqlite:///..., postgresql://..., journal:<path>; SQLite in the study otherwise')
  p.add_argument('--seed', type=int, default=0, help='of the sampler')
  p.add_argument('--launcher', choices=LAUNCHERS, default='local')
  p.add_argument('--dry_run', action='store_true', help='print what would be submitted')
  cli.add_resources(p)
  return p


def sweep(args, command):
  """The whole sweep, from its flags to its page. Returns the exit code."""
  # ------------------------------------------------------------------------ what, checked before anything starts
  axes, space = unique(map(grid.listed, args.set), '--set'), unique(map(grid.searched, args.search), '--search')
  if both := axes.keys() & space.keys():
    raise ValueError(f'Key {min(both)!r} has both --set and --search. Give one.')
  if args.trials < 1:
    raise ValueError(f'--trials {args.trials}: it is a whole number of 1 or more. Give one.')
  if args.study != grid.NOT_NAME.sub('_', args.study):
    raise ValueError(f'--study {args.study!r} is the name of a folder: letters, digits and _=.,+-. '
                     f'Write --study {grid.NOT_NAME.sub("_", args.study)}, and --folder for where it is.')
  study = studies.Study(f'{args.folder}/{args.study}', shlex.split(args.program), args.config)
  combinations = grid.combinations(axes)
  check_ends(study, combinations, space)

  # ------------------------------------------------------------------------ where
  resources = cli.resources(args)
  engine = getattr(importlib.import_module(f'launch.{args.launcher}'), LAUNCHERS[args.launcher])(resources)
  if args.dry_run:
    dry_run(engine, study, combinations, space, args)
    return 0
  lock = study.hold()  # noqa: F841 - held until the process ends.

  # ------------------------------------------------------------------------ run
  with pool.Stop() as stopped, table.Table(args.study, args.metric) as shown:
    plan = make_plan(study, combinations, space, args, shown.say)
    with pool.Pool(engine, resources) as running:
      pool.drive(running, plan, stopped, look=lambda: shown.update(plan))
    shown.update(plan, now=True)

  # ------------------------------------------------------------------------ tables and page
  return finish(study, plan, args, command, stopped)


def unique(pairs, flag):
  """{key: values}; a key that is given twice is an error."""
  found = {}
  for key, what in pairs:
    if key in found:
      raise ValueError(f'{flag} {key} is given twice. List its values with commas in one.')
    found[key] = what
  return found


def check_ends(study, combinations, space):
  """Builds the config of every combination at both ends of every range, and of every choice."""
  ends = {key: list(v.values) if isinstance(v, grid.Choices) else [str(v.low), str(v.high)] for key, v in space.items()}
  first = {key: texts[0] for key, texts in ends.items()}
  for settings in combinations:
    study.run({**settings, **first})
  for key, texts in ends.items():
    for text in texts:
      study.run({**combinations[0], **first, key: text})


def make_plan(study, combinations, space, args, say):
  """The plan of a grid or of searches; says what is there already."""
  if space:
    url = args.storage or f'sqlite:///{study.folder.absolute()}/optuna.db'
    options = search.Options(args.trials, args.metric, args.sampler, args.pruner, url, bool(args.storage),
                             args.seed)
    return search.Search(study, combinations, space, options, say)
  runs = study.runs(combinations)
  done = sum(run.status is values.Status.FINISHED for run in runs)
  same = len(combinations) - len(runs)
  said = [f'{study.folder}: {len(runs)} runs, {done} of them finished before.']
  said += [f'{same} more combinations have the config of another, and run once.'] if same else []
  say(' '.join(said))
  return plans.Grid(runs, say)


def dry_run(engine, study, combinations, space, args):
  """Prints what would be submitted first; a search proposes as it goes, so that of its start only."""
  runs = study.runs(combinations)
  if space:
    first = {key: v.values[0] if isinstance(v, grid.Choices) else v.low for key, v in space.items()}
    runs = [study.run({**settings, **{k: str(v) for k, v in first.items()}}) for settings in combinations]
    print(f'# {args.trials} trials of each, which vary {", ".join(space)}; the first, at the low ends:')
  left = [run.job for run in runs if run.status is not values.Status.FINISHED]
  print(engine.describe(left) if left else f'# All {len(runs)} have finished.')


def finish(study, plan, args, command, stopped):
  """Writes the tables and the page; returns the exit code."""
  summary = table.summary(plan.runs, plan.total, '')
  about = dict(study=args.study, command=command, config=args.config, metric=args.metric, summary=summary)
  studies.save(study.folder, plan.runs, about)
  print(f'{page.write(study.folder, plan.runs, args.metric, command, summary)}\n{study.folder / "sweep.csv"}')
  if stopped:
    print(f'{stopped.asked.name}: passed on to the runs, which saved. {summary}. The same command goes on.',
          file=sys.stderr)
    return 128 + stopped.asked
  ended = (values.Status.FINISHED, values.Status.PRUNED)
  failed = [run for run in plan.runs if run.status not in ended]
  if failed:
    print(f'{len(failed)} of {plan.total} runs did not finish: {", ".join(run.workdir.name for run in failed[:4])}. '
          'Each has a log.txt in its folder, which says why; the same command tries them again.', file=sys.stderr)
  return int(bool(failed))


if __name__ == '__main__':
  sys.exit(main())
