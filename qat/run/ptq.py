"""Quantizes a published network without training it, and goes on from where it was stopped.

    qat ptq --config configs/<file>.py[:arg] --workdir <dir> [--config.<leaf>=<value>]

Leaves in workdir: config.json, recipe.json (where bits were searched), solved/ (the layers done), coverage.json,
result.json, report.html. The same command goes on with a walk that was stopped, to the same bytes.
"""

import json
import sys
import time

from flax import nnx
import rich.box
import rich.console
import rich.table

from qat.evals import size
from qat.nn import calibrate
from qat.nn import recipes
from qat.nn import transform
from qat.nn import weights
from qat.ptq import named
from qat.ptq import stages
from qat.ptq import walk
from qat.run import config as configs
from qat.run import heap
from qat.run import mesh
from qat.run import metrics
from qat.run import names
from qat.run import progress
from qat.run import provenance
from qat.run import report
from qat.run import search
from qat.run import solved
from qat.run import tasks
from qat.run import transforms
from qat.run import workdirs


def main(config, workdir):
  """The whole run, from its config to its report."""
  heap.one_arena()
  began, origin = time.monotonic(), provenance.provenance()
  devices = mesh.alone(mesh.make(config), 'qat ptq')
  workdir = workdirs.begin(workdir, config)

  # ------------------------------------------------------------------------ network, grids, ranges of the inputs
  task = names.resolve(tasks, config.task, 'task')(config)
  if weights.any_codes(task.model):
    raise ValueError(f'pretrained {config.pretrained!r} holds codes, and floats are put on a grid here. Give what qat '
                     f'merge --into float made; qat evaluate --workdir {config.pretrained} says how good it is.')
  batches = devices.batches(task.batches)
  method = named.named(**config.method.to_dict(), links=task.links, loss=task.loss)
  floats = devices.module(transforms.before(task, config.transforms, recipes.resolve(config.recipe.to_dict())))
  model = transform.quantize(floats, recipes.resolve(search.recipe(floats, task, config, workdir)))
  model = calibrate.calibrate(model, batches, tasks.call)

  # ------------------------------------------------------------------------ solve
  start = time.monotonic()
  frozen, coverage = solve(model, floats, batches, method, workdir, config)
  frozen = devices.module(transforms.after(frozen, floats, task, config.transforms))
  placed = mesh.say(devices.facts(floats=nnx.state(floats), quantized=nnx.state(frozen)))
  walk_seconds, walk_bytes = time.monotonic() - start, provenance.peak_memory_bytes()
  metrics.write(workdir / 'coverage.json', json.dumps(coverage, indent=1) + '\n')
  heap.release()

  # ------------------------------------------------------------------------ evaluate, report
  taken = size.measure(frozen)
  result = dict(config=configs.plain(config), seed=config.seed, about=task.about, metrics=task.evaluate(frozen),
                bits_per_weight=taken.bits_per_weight, quantized_bytes=taken.quantized_bytes,
                fallbacks=[path for path, facts in coverage.items() if 'fallback' in facts],
                walk_seconds=walk_seconds, walk_peak_memory_bytes=walk_bytes,
                wall_seconds=time.monotonic() - began, peak_memory_bytes=provenance.peak_memory_bytes(), **placed,
                **origin)
  provenance.save(workdir / 'result.json', result)
  rich.console.Console().print(printed(result))
  for name, words in task.about.items():
    print(f'{name}: {words}')
  print(f'{write(workdir, result, coverage)}\n{workdir / "result.json"}', flush=True)


def solve(model, floats, batches, method, workdir, config):
  """The walk, with its progress shown and its stages kept."""
  total = len(stages.stages(model, tasks.call, batches[0]))
  with solved.Solved(workdir) as store, progress.bar(total, 0, config.log_every_seconds) as bar:

    def watch(done):
      bar.update(done, {})
      heap.trim()

    return walk.walk(model, floats, batches, method, tasks.call, store, watch)


def rows(result):
  """[(name, the float model's, the quantized one's)] as text."""
  found = result['metrics']
  floats = {name.removeprefix('float_'): value for name, value in found.items() if name.startswith('float_')}
  lines = [(name.replace('_', ' '), report.text(floats[name]) if name in floats else '', report.text(value))
           for name, value in found.items() if not name.startswith('float_')]
  taken = [('bits a quantized weight', '32', f'{result["bits_per_weight"]:.3f}'),
           ('bytes of quantized weights', '', f'{result["quantized_bytes"]:,}'),
           ('seconds', '', f'{result["walk_seconds"]:.0f}')]
  return lines + taken


def printed(result):
  """The table for a terminal."""
  table = rich.table.Table(title=title(result['config']), box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for i, head in enumerate(('', 'float', result['config']['method']['name'])):
    table.add_column(head, justify='right' if i else 'left')
  for row in rows(result):
    table.add_row(*row)
  return table


def title(config):
  return f'{config["pretrained"]}, {report.recipe_name(config["recipe"])}, {config["method"]["name"]}'


def write(workdir, result, coverage):
  """Writes report.html; returns its path."""
  columns = list(dict.fromkeys(name for facts in coverage.values() for name in facts))
  cells = [(path, *(facts.get(name, '') for name in columns)) for path, facts in coverage.items()]
  sections = {'Result': report.table(('', 'float', result['config']['method']['name']), rows(result)),
              'How it was measured': report.table(('', ''), list(result['about'].items())),
              'Layers': report.table(('layer', *(c.replace('_', ' ') for c in columns)), cells),
              'Provenance': report.provenance(result)}
  return report.write_page(workdir, title(result['config']), sections)


if __name__ == '__main__':
  from qat.run import cli
  sys.exit(cli.main(['ptq', *sys.argv[1:]]))
