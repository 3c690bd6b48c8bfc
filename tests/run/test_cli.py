"""Wrong input, each as one paragraph on stderr and exit code 2; and programs that end well."""

import collections
import json
import pathlib
import shutil

import pytest

from qat.run import cli
from qat.run import data

TINY = str(pathlib.Path(__file__).with_name('tiny.py'))


def train(workdir, *argv, arg=''):
  return cli.main(['train', f'--config={TINY}{arg}', f'--workdir={workdir}', *argv])


def paragraph(capfd):
  """What was said on stderr, which must be one line."""
  said = capfd.readouterr().err.strip()
  lines = [line for line in said.splitlines() if not line.startswith('WARNING')]
  assert len(lines) == 1, said
  assert 'Traceback' not in said
  return lines[0]


def test_a_run_leaves_its_files_and_can_be_evaluated(tmp_path, capfd):
  assert train(tmp_path) == 0
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['steps'] == 4 and result['seed'] == 0
  assert result['config']['model']['name'] == 'mlp.MLP'
  assert set(result) >= {'metrics', 'commit', 'versions', 'device', 'wall_seconds', 'peak_memory_bytes',
                         'bits_per_weight', 'size_bytes'}
  lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  steps = [(line['step'], line['split']) for line in lines]
  assert steps == [(1, 'train'), (2, 'train'), (3, 'train'), (4, 'train'), (4, 'test')]
  assert cli.main(['evaluate', f'--workdir={tmp_path}']) == 0
  said = capfd.readouterr().out
  assert 'best' in said and 'last' in said and f'{result["metrics"]["accuracy"]:.5g}' in said


def test_a_finished_run_stays_as_it_is(tmp_path, capfd):
  assert train(tmp_path) == 0
  first = json.loads((tmp_path / 'result.json').read_text())['metrics']
  assert train(tmp_path) == 0
  assert 'Going on from step 4 of 4' in capfd.readouterr().out
  assert json.loads((tmp_path / 'result.json').read_text())['metrics'] == first


@pytest.mark.parametrize('argv, words', [
    (['trian', '--workdir=/tmp'], "Program 'trian' does not exist. Did you mean 'train'?"),
    (['train', '--workdir=/tmp'], '--config is not given'),
    (['train', f'--config={TINY}'], '--workdir is not given'),
    (['train', '--config=nowhere/x.py', '--workdir=/tmp'], "Config file 'nowhere/x.py' does not exist"),
    (['train', f'--config={TINY}', '--wrkdir=/tmp'], "wrkdir"),
    (['train', f'--config={TINY}', '--workdir=/tmp', '--config.totl_steps=1'], "Did you mean 'total_steps'?"),
    (['train', f'--config={TINY}', '--workdir=/tmp', '--config.total_steps=many'], 'total_steps=many'),
    (['evaluate', '--workdir=/nowhere'], 'no run started there'),
    (['report', '--workdir=/nowhere'], 'no run started there'),
])
def test_wrong_command_line(capfd, argv, words):
  assert cli.main(argv) == 2
  assert words in paragraph(capfd)


@pytest.mark.parametrize('override, words', [
    ('model.name=mlp.MPL', "Did you mean 'MLP'?"),
    ('model.name=mpl.MLP', "Did you mean 'mlp'?"),
    ('model.dtype=bfloat17', "Did you mean 'bfloat16'?"),
    ('objective=clasification', "Did you mean 'classification'?"),
    ('optimizer.name=adamm', "optax has no 'adamm'"),
    ('schedule.name=cosine', 'Choose one of two_stage_linear, constant_schedule, cosine_decay_schedule'),
    ('data.name=digitz', 'digits'),
    ('data.test=tset', 'tset'),
    ('data.batch_size=9999', '9999'),
    ('optimizer.accumulate_steps=5', 'accumulate_steps 5 does not divide the batch of 16'),
    ('init_from=/nowhere', 'no run started there'),
])
def test_wrong_values(tmp_path, capfd, override, words):
  assert train(tmp_path, f'--config.{override}') == 2
  assert words in paragraph(capfd)


def test_workdir_that_cannot_be_written(tmp_path, capfd):
  (tmp_path / 'file').touch()
  assert train(tmp_path / 'file' / 'run') == 2
  assert 'cannot be written: Not a directory. Choose a folder' in paragraph(capfd)


def test_another_config_in_the_same_workdir(tmp_path, capfd):
  assert train(tmp_path) == 0
  capfd.readouterr()
  assert train(tmp_path, '--config.model.sizes=(64, 8, 10)') == 2
  assert 'model.sizes: [64, 16, 10] there, [64, 8, 10] now' in paragraph(capfd)
  assert cli.main(['evaluate', f'--config={TINY}', f'--workdir={tmp_path}', '--config.model.sizes=(64, 8, 10)']) == 2
  assert 'another config' in paragraph(capfd)


def test_a_run_that_never_began_leaves_the_workdir_free(tmp_path):
  assert train(tmp_path, '--config.optimizer.name=adamm') == 2
  assert train(tmp_path) == 0


def test_full_disk_while_metrics_are_written(tmp_path, capfd):
  """/dev/full takes nothing, as a full disk does."""
  (tmp_path / 'metrics.jsonl').symlink_to('/dev/full')
  assert train(tmp_path) == 2
  assert 'The disk is full' in paragraph(capfd)


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
  def broken(*_, **__):
    return [][1]
  monkeypatch.setattr(data, 'load', broken)
  with pytest.raises(IndexError):
    train(tmp_path)


def test_usage_lists_the_programs(capfd):
  assert cli.main([]) == 2
  assert cli.main(['--help']) == 0
  said = capfd.readouterr().out
  assert all(program in said for program in cli.PROGRAMS)
  assert cli.main(['train', '--help']) == 0
  assert 'The same command goes on' in capfd.readouterr().out


def test_full_disk_before_a_checkpoint(tmp_path, capfd, monkeypatch):
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**9, 10**9, 1000))
  assert train(tmp_path) == 2
  said = paragraph(capfd)
  assert 'The disk is full while writing' in said and '1,000 bytes are free' in said and 'Free some space' in said


def damage(workdir, step):
  for path in (workdir / 'checkpoints' / str(step) / 'state').rglob('d/*'):
    path.write_bytes(b'damaged')


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, capfd):
  assert train(tmp_path) == 0
  first = json.loads((tmp_path / 'result.json').read_text())['metrics']
  damage(tmp_path, 4)
  assert train(tmp_path) == 0
  said = capfd.readouterr()
  assert 'WARNING: Checkpoint 4 of' in said.err and 'going on from the checkpoint of step 2' in said.err
  assert 'Going on from step 2 of 4.' in said.out
  assert json.loads((tmp_path / 'result.json').read_text())['metrics'] == first


def test_all_checkpoints_damaged(tmp_path, capfd):
  assert train(tmp_path) == 0
  damage(tmp_path, 2), damage(tmp_path, 4)
  assert cli.main(['evaluate', f'--workdir={tmp_path}']) == 2
  assert 'No checkpoint' in paragraph(capfd)
  assert train(tmp_path) == 2
  assert 'Every checkpoint of' in paragraph(capfd)


def test_wrong_recipes(tmp_path, capfd):
  """From a config file of the user's own."""
  for recipe, words in [
      ("dict(quantizer='lsqq', weight_bits=2, input_bits=2)", "Did you mean 'lsq'?"),
      ("dict(name='w4a9')", "recipe 'w4a9': there is none of that name"),
      ("dict(name='w4a8', rules={'hed': 'w8a8'})", "No layer matches the rules ['hed'"),
      ("dict(name='w4a16_g128')", '128')]:
    path = tmp_path / 'mine.py'
    path.write_text(
        'import ml_collections\nfrom tests.run import tiny\n\ndef get_config():\n  config = tiny.get_config()\n'
        f'  config.recipe = ml_collections.ConfigDict({recipe})\n  return config\n')
    assert cli.main(['train', f'--config={path}', f'--workdir={tmp_path}/run']) == 2
    assert words in paragraph(capfd)


def test_training_from_a_float_run(tmp_path):
  assert train(tmp_path / 'float', arg=':steps=60') == 0
  floats = json.loads((tmp_path / 'float' / 'result.json').read_text())['metrics']
  warm = f'--config.init_from={tmp_path}/float'
  assert train(tmp_path / 'warm', warm, '--config.optimizer.learning_rate=1e-9', arg=':quantizer=lsq,bits=8') == 0
  result = json.loads((tmp_path / 'warm' / 'result.json').read_text())
  assert result['metrics']['accuracy'] == pytest.approx(floats['accuracy'], abs=0.02)
  assert result['frozen_equals_trained']
  assert train(tmp_path / 'other', f'--config.init_from={tmp_path}/warm') == 2


def test_training_in_bfloat16(tmp_path):
  assert train(tmp_path, '--config.model.dtype=bfloat16', arg=':quantizer=lsq,steps=60') == 0
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['metrics']['accuracy'] > 0.7
  assert result['frozen_equals_trained']
