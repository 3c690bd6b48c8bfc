"""The command line: what it reads, and what it says when it cannot."""

import json
import pathlib

import pytest

from qat.run import config as configs

TINY = str(pathlib.Path(__file__).with_name('tiny.py'))


def parse(*argv):
  return configs.parse([f'--config={TINY}', '--workdir=/nowhere', *argv])


def test_overrides_keep_the_type_of_the_leaf():
  config, workdir = parse(
      '--config.total_steps=7', '--config.model.sizes=(64, 10)', '--config.optimizer.learning_rate=1')
  assert config.total_steps == 7
  assert config.model.sizes == (64, 10)
  assert config.optimizer.learning_rate == 1.0
  assert workdir == pathlib.Path('/nowhere')


def test_argument_of_the_config_file():
  config, _ = configs.parse([f'--config={TINY}:steps=9', '--workdir=/nowhere'])
  assert config.total_steps == 9


def test_the_config_is_locked():
  config, _ = parse()
  with pytest.raises(AttributeError):
    config.totl_steps = 3


@pytest.mark.parametrize('argv, words', [
    (['--config.totl_steps=3'], ['totl_steps', "Did you mean 'total_steps'?"]),
    (['--config.optimizer.learning_rat=3'], ["Did you mean 'optimizer.learning_rate'?"]),
    (['stray'], ["['stray']", '--config=']),
])
def test_a_wrong_override_says_what_is_near(argv, words):
  with pytest.raises(ValueError) as error:
    parse(*argv)
  assert all(word in str(error.value) for word in words)


def test_a_wrong_argument_of_the_file_says_what_is_near():
  with pytest.raises(ValueError, match="there is no 'stepz'. Did you mean 'steps'"):
    configs.parse([f'--config={TINY}:stepz=9', '--workdir=/nowhere'])


def test_a_missing_file_says_which_are_there(tmp_path):
  (tmp_path / 'digits.py').touch()
  with pytest.raises(ValueError, match='does not exist. Did you mean .*digits.py'):
    configs.parse([f'--config={tmp_path}/digitz.py', '--workdir=/nowhere'])


def test_workdir_is_needed():
  with pytest.raises(ValueError, match='--workdir is not given'):
    configs.parse([f'--config={TINY}'])


def test_the_config_of_an_earlier_run_is_read_back(tmp_path):
  config, _ = parse()
  (tmp_path / 'config.json').write_text(json.dumps(configs.plain(config)))
  assert configs.load(tmp_path).to_dict() == config.to_dict()


def test_another_config_in_the_same_workdir_names_the_leaves(tmp_path):
  config, _ = parse()
  (tmp_path / 'config.json').write_text(json.dumps(configs.plain(config)))
  configs.check_same(parse('--config.log_every_steps=50')[0], tmp_path)  # Logging may change.
  with pytest.raises(ValueError, match='optimizer.learning_rate: 0.01 there, 0.5 now'):
    configs.check_same(parse('--config.optimizer.learning_rate=0.5')[0], tmp_path)
  with pytest.raises(ValueError, match='recipe.weight_bits: .*absent.* there, 4 now'):
    configs.check_same(configs.parse([f'--config={TINY}:quantizer=lsq', '--workdir=/nowhere'])[0], tmp_path)


def test_what_is_no_config_file_is_refused(tmp_path):
  for name in ('notes.md', 'empty.py'):
    (tmp_path / name).touch()
  for name, message in (('notes.md', 'is no Python file'), ('empty.py', 'has no get_config')):
    with pytest.raises(ValueError, match=message):
      configs.parse([f'--config={tmp_path / name}', '--workdir=/nowhere'])


@pytest.mark.parametrize('leaf', configs.COUNTS)
def test_counts_are_of_one_or_more(leaf):
  configs.check_counts(parse()[0])
  with pytest.raises(ValueError, match=f'--config.{leaf}=0: it is a whole number of 1 or more'):
    configs.check_counts(parse(f'--config.{leaf}=0')[0])
