"""A slip in a key or a value fails before anything starts."""

import json
import pathlib
import subprocess
import sys

import pytest

from launch import grid
from launch import leaves

ROOT = pathlib.Path(__file__).parents[2]
MNIST = 'configs/mnist.py'


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('settings, words', [
    ({'sead': '1'}, "Key 'sead': configs/mnist.py has none of that name. Did you mean 'seed'?"),
    ({'optimizer.lr': '1'}, "Did you mean 'optimizer.learning_rate'?"),
    ({'optimizer.learning_rte': '1'}, "Did you mean 'optimizer.learning_rate'?"),
    ({'learning_rate': '1'}, "Did you mean 'optimizer.learning_rate'?"),
    ({'quantizer.bits': '2'}, "Did you mean ':bits'?"), ({'bits': '2'}, "Did you mean ':bits'?"),
    ({':bitz': '2'}, "Did you mean 'bits'?"), ({':bits': 'two'}, 'is no int'),
    ({'seed': 'x'}, "invalid literal for int() with base 10: 'x'"), ({'total_steps': '1.5'}, '1.5'),
    ({'recipe': '2'}, "Did you mean 'recipe")])
def test_slips(settings, words):
  with pytest.raises(ValueError) as error:
    leaves.resolved(MNIST, settings)
  assert words in str(error.value)


@pytest.mark.parametrize('config, words', [
    ('configs/mnits.py', "Did you mean 'configs/mnist.py'?"), ('nowhere/a.py', "'nowhere/a.py' does not exist"),
    ('README.md', 'does not exist')])
def test_config_files_that_are_not_there(config, words):
  with pytest.raises(ValueError) as error:
    leaves.resolved(config, {})
  assert words in str(error.value)


def test_it_reads_what_the_program_reads():
  """The program's own parser is the oracle, in a process of its own: configs and launch never meet qat."""
  settings = {':bits': '3', 'seed': '7', 'optimizer.learning_rate': '0.25', 'model.channels': '(4, 8)'}
  code = ('import sys; from qat.run import config as c; import json; '
          'print(json.dumps(c.plain(c.parse(sys.argv[1:])[0]), sort_keys=True))')
  argv = grid.command((), MNIST, settings, '/tmp/none')
  out = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, check=True).stdout
  assert leaves.resolved(MNIST, settings) == json.loads(out)


def test_what_is_read_twice_was_not_written_to():
  first = leaves.resolved(MNIST, {'seed': '5'})
  assert leaves.resolved(MNIST, {})['seed'] == 0 and first['seed'] == 5


def test_arguments_of_a_file():
  assert leaves.arguments('configs/mnist.py:bits=2') == ['quantizer', 'bits', 'first_last', 'smoke']
