"""`qat finetune` on a small published network: what it leaves, that it goes on, and what it refuses."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import numpy as np
import pytest

from qat.export import peft
from qat.models.pretrained import families
from qat.nn import lora
from qat.nn import recipes
from qat.nn import transform
from qat.run import adaptation
from qat.run import checkpoint
from qat.run import cli
from qat.run import config as configs
from qat.run import published
from qat.run import state as states
from tests.run import tiny_finetune

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def there(tmp_path_factory):
  """A folder with a network and texts."""
  folder = tmp_path_factory.mktemp('tiny')
  tiny_finetune.network(folder / 'net', layers=1)
  (folder / 'text.txt').write_text(tiny_finetune.TEXT * 20)
  lines = [dict(messages=[dict(role='user', content=f'{i}?'), dict(role='assistant', content='yes' * (1 + i % 5))])
           for i in range(24)]
  (folder / 'chats.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  (folder / 'empty.txt').write_text(' \n')
  return folder


def source(there, arg='', train='text.txt'):
  return f'{ROOT}/tests/run/tiny_finetune.py:folder={there}/net,train={there}/{train},{arg}'


def finetune(there, workdir, arg='', *argv, train='text.txt'):
  return cli.main(['finetune', f'--config={source(there, arg, train)}', f'--workdir={workdir}', *argv])


def result(workdir):
  return json.loads((workdir / 'result.json').read_text())


def paragraph(capfd):
  """What was said on stderr, which must be one line."""
  said = capfd.readouterr().err.strip()
  assert len(said.splitlines()) == 1 and 'Traceback' not in said, said
  return said


def arrays(workdir, step):
  names = checkpoint.about(workdir, step)['checksums']
  return {name: checkpoint.array_of(workdir, step, name) for name in names}


@pytest.fixture(scope='module')
def done(there, tmp_path_factory):
  """The workdir of a whole run, with dropout, whose random keys are state."""
  workdir = tmp_path_factory.mktemp('done')
  assert finetune(there, workdir, 'dropout=0.1,steps=30') == 0
  return workdir


def test_the_loss_falls_and_the_base_stays(done):
  found = result(done)
  assert found['metrics']['loss'] < found['metrics_before']['loss'] - 0.3
  assert found['base_unchanged'] and found['base_sha256'] == found['base_sha256_after']
  # 7 layers: rank 4 times their inputs and outputs.
  each = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
  assert found['trained_parameters'] == 4 * each
  # NF4 and double quantization: 4 + 8/64 bits, and a few floats over these small matrices.
  assert 4.125 < found['bits_per_weight'] < 4.3
  assert 'blocks/0/attention/q' in (done / 'report.html').read_text()


def test_the_adapter_is_left_in_the_layout_of_peft(there, done):
  floats = published.load(f'{there}/net').model
  again = peft.load(floats, done / 'adapter', families.FAMILIES['llama'])
  kept = arrays(done, 30)
  for path, held in lora.adapters(again).items():
    np.testing.assert_array_equal(held['default'].A.get_value(), kept[f'params/{path}/adapters/kernel/default/A'])


def test_checkpoints_hold_adapters_and_not_the_base(done):
  kept = arrays(done, 30)
  params = {name for name in kept if name.startswith('params/')}
  assert len(params) == 2 * 7 and all(name.endswith(('/A', '/B')) for name in params)
  assert any('rngs' in name for name in kept)                            # Dropout's keys.
  assert not [name for name in kept if 'codes' in name or 'embedding' in name]
  assert checkpoint.about(done, 30)['base_sha256'] == result(done)['base_sha256']


def test_the_codes_are_those_of_the_recipe_and_nothing_is_a_full_size_float(there):
  config = configs.build(source(there))
  run = adaptation.run(config)
  big = {path: x.dtype for path, x in run.skeleton.base.items() if x.size >= 64 * 32 and 'embed' not in path}
  assert big and not [p for p, dtype in big.items() if jax.numpy.issubdtype(dtype, jax.numpy.floating)]
  state = states.new(run.state.params, run.state.rest, run.tx)
  before = {k: np.asarray(v).tobytes() for k, v in run.skeleton.base.items()}
  step = states.train_step(run.skeleton, run.objective, run.tx)
  for batch, _ in zip(adaptation.batches(run), range(2)):
    state, values = step(state, batch)
  assert bool(values['finite']) and {k: np.asarray(v).tobytes() for k, v in run.skeleton.base.items()} == before
  assert sorted(run.model(state).__dict__) == sorted(published.load(f'{there}/net').model.__dict__)


def test_before_the_first_step_it_is_the_frozen_network(there):
  for arg, same in (('init=gaussian', True), ('base=float,init=pissa', True), ('init=loftq', False),
                    ('init=pissa', False)):
    config = configs.build(source(there, arg))
    floats = published.load(config.pretrained).model
    tokens = jax.numpy.arange(24)[None]
    y = adaptation.adapted(floats, config)(tokens)
    if same:
      recipe = config.recipe.to_dict()
      frozen = transform.freeze(transform.quantize(floats, recipes.resolve(recipe))) if recipe else floats
      np.testing.assert_allclose(y, frozen(tokens), atol=2e-4)
    else:
      assert np.isfinite(y).all() and np.abs(y - floats(tokens)).max() > 0


def test_full_fine_tuning_moves_every_parameter(there, tmp_path):
  assert finetune(there, tmp_path, 'rules=,base=float,steps=2', '--config.optimizer.learning_rate=0.001') == 0
  found = result(tmp_path)
  total = sum(x.size for x in jax.tree.leaves(nnx.state(published.load(f'{there}/net').model, nnx.Param)))
  assert found['trained_parameters'] == total
  assert finetune(there, tmp_path / 'codes', 'rules=') == 2


def test_chats_count_answers_and_are_grouped_by_length(there, tmp_path):
  assert finetune(there, tmp_path, 'packing=rows_by_length,length=96,steps=4', train='chats.jsonl') == 0
  found = result(tmp_path)
  assert found['metrics']['loss'] < found['metrics_before']['loss']


@pytest.mark.parametrize('argv', [
    ['--config.optimizer.accumulate_steps=2'], ['--config.remat=blocks/\\d+'],
    ['--config.optimizer.memory=pinned_host']])
def test_ways_to_save_memory_change_no_more_than_the_order_of_sums(there, plain_loss, argv):
  loss, run, state = three_steps(there, *argv)
  np.testing.assert_allclose(loss, plain_loss, rtol=2e-4)
  if run.memory:
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)} == {'pinned_host'}
    assert {x.sharding.memory_kind for x in state.params.values()} == {'device'}


@pytest.fixture(scope='module')
def plain_loss(there):
  return three_steps(there)[0]


def three_steps(there, *argv):
  """(the loss of the third step, the Run, its state)."""
  config = configs.parse([f'--config={source(there, "steps=3")}', '--workdir=.', *argv])[0]
  run = adaptation.run(config)
  state, batches = run.state, adaptation.batches(run)
  step = states.train_step(run.skeleton, run.objective, run.tx, config.optimizer.accumulate_steps, run.memory)
  for _ in range(3):
    state, values = step(state, next(batches))
  return float(values['loss']), run, state


@pytest.mark.parametrize('arg, argv', [
    ('base=mxfp4', ['--config.adapter.dora=True', '--config.adapter.scaling=by_root_of_rank']),
    ('base=w4a16_g32,rank=2', ['--config.adapter.group=32', '--config.optimizer.state_bits=8'])])
def test_other_adapters_and_bases_learn(there, arg, argv):
  config = configs.parse([f'--config={source(there, arg)}', '--workdir=.', *argv])[0]
  run = adaptation.run(config)
  step, state = states.train_step(run.skeleton, run.objective, run.tx), run.state
  before = jax.tree.map(np.asarray, state.params)
  for batch, _ in zip(adaptation.batches(run), range(3)):
    state, values = step(state, batch)
  assert bool(values['finite'])
  assert all(np.any(np.asarray(x) != before[path]) for path, x in state.params.items())
  assert any('magnitude' in path for path in state.params) == config.adapter.dora


@pytest.mark.parametrize('arg, argv, words', [
    ('', ['--config.pretrained=smollm3'], "Published network 'smollm3': there is no such name, file or folder."),
    ('rank=65', [], "was given rank 65. A B has at most rank 32"),
    ('rules=heads', [], "No layer matches the rules ['heads']"),
    ('init=lofq', [], "adapter.init 'lofq': there is none of that name. Did you mean 'loftq'?"),
    ('base=float,init=loftq', [], "starts from what rounding took away"),
    ('base=nf5', [], "recipe 'nf5'"),
    ('rules=', [], 'codes do not train'),
    ('length=256', [], '--config.data.length=256: sequences have from 2 tokens to the 128'),
    ('packing=streams', [], "data.packing 'streams'"),
    ('', ['--config.data.separator=</s>'], "data.separator '</s>': the tokenizer of"),
    ('', ['--config.optimizer.memory=host'], "optimizer.memory 'host'"),
    ('', ['--config.remat=block'], "remat 'block' matches no module"),
    ('', ['--config.data.batch_size=100'], 'Batches of 100'),
    ('', ['--config.data.name=onion'], "Did you mean 'union'?"),
    ('', ['--config.adapter.rnk=3'], "Did you mean 'adapter.rank'?")])
def test_wrong_input_is_one_paragraph(there, tmp_path, capfd, arg, argv, words):
  assert finetune(there, tmp_path, arg, *argv) == 2
  assert words in paragraph(capfd)
  assert not (tmp_path / 'result.json').exists() and not checkpoint.steps(tmp_path)


@pytest.mark.parametrize('name, content, words', [
    ('empty.txt', None, 'the file is empty'),
    ('none.txt', None, 'there is no such file'),
    ('bad.jsonl', '{"text": "a"}\n{"text": ', 'bad.jsonl, line 2: it is no JSON'),
    ('keys.jsonl', '{"txt": "a"}\n', 'keys.jsonl, line 1: it has neither "text"'),
    ('roles.jsonl', '{"messages": [{"role": "user", "content": "a"}]}\n', "roles.jsonl, line 1: The chat"),
    ('bytes.txt', b'\xff\xfe', 'it is no text in UTF-8'),
    ('short.txt', 'ab', 'have 3 tokens in all, and a sequence takes 32')])
def test_wrong_files_are_one_paragraph(there, tmp_path, capfd, name, content, words):
  if content is not None:
    (there / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  assert finetune(there, tmp_path, train=name) == 2
  assert words in paragraph(capfd)


def test_the_tokenizer_of_another_network_is_refused(there, tmp_path, capfd):
  larger = tiny_finetune.tokenizer()
  larger.add_tokens(['the'])
  larger.save(str(tmp_path / 'tokenizer.json'))
  assert finetune(there, tmp_path / 'run', '', f'--config.tokenizer={tmp_path}/tokenizer.json') == 2
  assert 'it is the tokenizer of another network' in paragraph(capfd)


def test_a_workdir_of_another_config_or_another_base_is_refused(there, done, capfd):
  capfd.readouterr()
  assert finetune(there, done, 'dropout=0.1,steps=30,rank=8') == 2
  assert 'adapter.rank: 4 there, 8 now' in paragraph(capfd)
  weights = there / 'net' / 'model.safetensors'
  kept = weights.read_bytes()
  try:
    tiny_finetune.network(there / 'net', layers=1, seed=1)
    assert finetune(there, done, 'dropout=0.1,steps=30') == 2
    assert 'trained beside a base of SHA-256' in paragraph(capfd)
  finally:
    weights.write_bytes(kept)


def test_numbers_that_are_not_finite_stop_it(there, tmp_path, capfd):
  assert finetune(there, tmp_path, 'steps=4', '--config.optimizer.learning_rate=1e30') == 2
  said = paragraph(capfd)
  assert 'is not finite (NaN or infinite)' in said and 'Training stopped' in said


def test_killed_it_goes_on_to_the_same_bytes(there, done, tmp_path):
  command = [sys.executable, '-m', 'qat.run.finetune', f'--config={source(there, "dropout=0.1,steps=30")}',
             f'--workdir={tmp_path}']
  env = dict(os.environ, JAX_PLATFORMS='cpu')
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  start = lambda: subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
  process, deadline = start(), time.monotonic() + 120
  while not checkpoint.steps(tmp_path) and time.monotonic() < deadline:
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL and not (tmp_path / 'result.json').exists()
  process = start()
  out, err = process.communicate(timeout=240)
  assert process.returncode == 0 and 'Going on from step' in out, err
  ours, theirs = arrays(tmp_path, 30), arrays(done, 30)
  assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
  assert result(tmp_path)['metrics'] == result(done)['metrics']
