"""The search for bits of `qat ptq`: what it finds is within the budget, is used, and is a recipe for `qat train`."""

import json

import pytest

from qat.nn import recipes
from qat.run import cli
from tests.run import test_ptq

floats = test_ptq.floats
ARGUMENT = 'method=gptq,recipe=w4a16,examples=64'


def search(workdir, floats, *argv):
  return test_ptq.ptq(workdir, floats, ARGUMENT, "--config.search.candidates=('w2a16', 'w8a16')",
                      '--config.search.bits_per_weight=5.0', *argv)


@pytest.mark.parametrize('sensitivity', ['fisher', 'hessian', 'kl', 'output'])
def test_it_finds_a_recipe_within_the_budget_and_quantizes_with_it(tmp_path, floats, sensitivity):
  assert search(tmp_path, floats, f'--config.search.sensitivity={sensitivity}') == 0
  found = json.loads((tmp_path / 'recipe.json').read_text())
  # 64 x 16 and 16 x 10 weights with a float32 an output: the head alone fits in 8 bits.
  assert found == dict(name='float', rules={'layers/0': 'w2a16', 'layers/1': 'w8a16'})
  taken = test_ptq.result(tmp_path)['bits_per_weight']
  assert taken == pytest.approx((2 * 1024 + 8 * 160 + 32 * 26) / 1184) and taken <= 5


def test_the_recipe_is_one_that_a_network_is_trained_under(tmp_path, floats):
  assert search(tmp_path / 'ptq', floats) == 0
  found = json.loads((tmp_path / 'ptq' / 'recipe.json').read_text())
  assert [rule.path for rule in recipes.resolve(found)] == ['layers/0', 'layers/1', '.*']
  config = tmp_path / 'config.py'
  lines = ['import json', 'import pathlib', 'from tests.run import tiny', '', 'def get_config():',
           "  config = tiny.get_config('steps=2')",
           f"  config.recipe.update(json.loads(pathlib.Path('{tmp_path}/ptq/recipe.json').read_text()))",
           '  return config', '']
  config.write_text('\n'.join(lines))
  assert cli.main(['train', f'--config={config}', f'--workdir={tmp_path}/train']) == 0
  assert test_ptq.result(tmp_path / 'train')['frozen_equals_trained']


@pytest.mark.parametrize('leaf, words', [
    ('sensitivity=fischer', "search.sensitivity 'fischer': there is none of that name. Did you mean 'fisher'?"),
    ('bits_per_weight=2.0', 'cannot be met'), ("candidates=('w2a61',)", "recipe 'w2a61'")])
def test_wrong_input_is_one_paragraph(tmp_path, floats, capfd, leaf, words):
  capfd.readouterr()
  assert search(tmp_path, floats, f'--config.search.{leaf}') == 2
  assert words in test_ptq.paragraph(capfd)
