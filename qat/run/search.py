"""The search for bits: `config.search` of `qat ptq`. Which recipe each layer gets, under a budget.

    config.search.update(candidates=('w2a16_g64', 'w3a16_g64', 'w4a16_g64'), bits_per_weight=3.5)

The recipe that is found is left in workdir/recipe.json, in the form that `config.recipe` has in any config.
"""

import json
import re

from qat.nn import recipes
from qat.nn import rules
from qat.ptq import allocate
from qat.ptq import sensitivity
from qat.run import metrics
from qat.run import names
from qat.run import tasks

PROBES = 4  # Hutchinson's, for each batch.


def fisher(model, candidates, task):
  return sensitivity.fisher(model, candidates, task.examples(), _loss(task, 'fisher'))


def hessian(model, candidates, task):
  return sensitivity.hessian(model, candidates, task.batches, _loss(task, 'hessian'), PROBES)


def kl(model, candidates, task):
  return sensitivity.divergence(model, candidates, task.batches, tasks.call)


def output(model, candidates, task):
  return sensitivity.noise(model, candidates, task.batches, tasks.call)


SENSITIVITIES = dict(fisher=fisher, hessian=hessian, kl=kl, output=output)


def recipe(model, task, config, workdir):
  """The recipe to quantize with, as plain data: config.recipe, or what the search of config.search finds.

  A search that has ended is not made again: its recipe.json is read.

  Args:
    model: in floats.
    task: a tasks.Task.
    config: with `recipe`, which says which layers are quantized at all, and `search`.
    workdir: where recipe.json is left.
  """
  if not config.search.candidates:
    return config.recipe.to_dict()
  path = workdir / 'recipe.json'
  if not path.is_file():
    metrics.write(path, json.dumps(search(model, task, config.recipe.to_dict(), config.search), indent=1) + '\n')
  return json.loads(path.read_text())


def search(model, task, recipe, wanted):
  """{'name': 'float', 'rules': {path: name of a candidate}}, for the layers that `recipe` quantizes."""
  if wanted.sensitivity not in SENSITIVITIES:
    raise ValueError(f'search.sensitivity {wanted.sensitivity!r}: there is none of that name. '
                     f'{names.suggest(wanted.sensitivity, SENSITIVITIES)}')
  candidates = {name: recipes.get(name) for name in wanted.candidates}
  chosen = rules.first_matches(recipes.resolve(recipe), rules.sites(model)).items()
  paths = {site.path for site, rule in chosen if rule is not None and rule.weight is not None}
  costs = SENSITIVITIES[wanted.sensitivity](model, candidates, task)
  costs = {path: row for path, row in costs.items() if path in paths}
  budget = allocate.BitsPerWeight(wanted.bits_per_weight)
  choice = allocate.allocate(costs, allocate.sizes(model, candidates), budget)
  sites = allocate.weight_sites(model)
  shared = {id(sites[path].variable): name for path, name in choice.items()}
  return dict(name='float', rules={re.escape(path): shared[id(site.variable)] for path, site in sites.items()
                                   if id(site.variable) in shared})


def _loss(task, what):
  if task.loss is None:
    raise ValueError(f"search.sensitivity {what!r} comes from the task's loss, and this task names none. "
                     "Use 'output'.")
  return task.loss
