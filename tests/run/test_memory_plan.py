"""A plan is what the compiled step takes, and no more than shapes are needed for it."""

import dataclasses

import pytest

from qat.run import config as configs
from qat.run import memory_plan
from tests.run import test_finetune, tiny_finetune


@pytest.fixture(scope='module')
def six(tmp_path_factory):
  return tiny_finetune.network(tmp_path_factory.mktemp('six') / 'net', layers=6)


def config_of(folder, *argv):
  source = f'{test_finetune.ROOT}/tests/run/tiny_finetune.py:folder={folder},length=64'
  return configs.parse([f'--config={source}', '--workdir=.', *argv])[0]


@pytest.mark.parametrize('argv', [
    ['--config.remat=blocks/\\d+', '--config.optimizer.state_bits=8'], pytest.param([], marks=pytest.mark.slow)])
def test_a_plan_from_three_blocks_is_what_six_take(six, argv):
  config = config_of(six, *argv)
  planned = memory_plan.plan(config)
  _, _, xla = memory_plan.compiled(config, memory_plan.shape_of(str(six)))
  assert planned.total == pytest.approx(taken(xla), rel=0.1)


def taken(xla):
  """Bytes of a compiled step."""
  return xla.argument_size_in_bytes + xla.output_size_in_bytes - xla.alias_size_in_bytes + xla.temp_size_in_bytes


def test_remat_saves_activations(six):
  shape = dataclasses.replace(memory_plan.shape_of(str(six)), layers=3)
  kept, again = (memory_plan.compiled(config_of(six, *argv), shape)[2].temp_size_in_bytes
                 for argv in ([], ['--config.remat=blocks/\\d+']))
  assert again < 0.6 * kept


def test_the_base_of_70b_is_counted_without_a_number_of_it(six):
  config = config_of(six)
  shape = dataclasses.replace(memory_plan.shape_of('llama2_70b'), layers=1)
  model = memory_plan.abstract(config, shape)
  found, packed = memory_plan.base(model, config)
  per_block = 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672
  assert packed['codes'] == per_block / 2
  assert packed['scales and zeros'] == pytest.approx(per_block * 0.127 / 8, rel=0.01)
  assert found['floats'] == 4 * (2 * 32000 * 8192 + 3 * 8192)


def test_names_that_are_none(six):
  with pytest.raises(ValueError, match="Did you mean 'llama3_70b'"):
    memory_plan.shape_of('llama3_71b')


@pytest.mark.slow
def test_the_plan_of_smollm2_is_what_its_thirty_blocks_take():
  source = f'{test_finetune.ROOT}/configs/smollm2_qlora.py'
  config = configs.parse([f'--config={source}', '--workdir=.'])[0]
  planned = memory_plan.plan(config)
  _, _, xla = memory_plan.compiled(config, memory_plan.shape_of('smollm2'))
  assert planned.total == pytest.approx(taken(xla), rel=0.1)
  # The weights of the blocks in float32 would be 405 MiB, and what is kept for the backward pass is more than that.
  config.remat = r'blocks/\d+'
  _, _, xla = memory_plan.compiled(config, memory_plan.shape_of('smollm2'))
  assert xla.temp_size_in_bytes < 405 * 2**20
