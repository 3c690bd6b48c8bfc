"""Whole sweeps as processes: of a program that behaves as qat train does, and takes no time."""

import os
import signal
import subprocess
import sys

import pytest

from launch import sweep
from tests.launch import sweeps
from tests.run import test_report

TWELVE = ('--set', ':bits=2,3,4', '--set', 'seed=0..3', '--workers', '2')


def test_killed_half_way_and_started_again(tmp_path):
  """SIGKILL: nothing can be handed over. 12 finish, none twice, none beside another."""
  slow = ('--set', 'step_seconds=0.05')
  before, _, out, _ = sweeps.killed_and_started_again(tmp_path, 5, *TWELVE, *slow)
  assert 5 <= before <= 8
  assert f'12 runs, {before} of them finished before' in out or f'12 runs, {before + 1} of them' in out
  assert '12/12 finished' in out
  rows = sweeps.rows(tmp_path / 's')
  assert [(r['bits'], r['seed']) for r in rows] == [(b, s) for b in '234' for s in '0123']
  for row in rows:
    assert row['status'] == 'finished' and row['exit_code'] in ('0', '')
    assert float(row['accuracy']) == pytest.approx(1 - 2.0 ** -int(row['bits']) + 0.001 * int(row['seed']))
    assert float(row['bits_per_weight']) == int(row['bits']) + 0.5
  assert sweeps.about(tmp_path / 's')['summary'] == '12/12 finished'
  code, out, _ = sweeps.sweep(tmp_path, *TWELVE, *slow)  # And a third time: nothing to do.
  assert code == 0 and '12 runs, 12 of them finished before' in out
  sweeps.check_ended_once(tmp_path / 's', 12)


@pytest.mark.slow
def test_sigterm_stops_and_saves_and_the_same_command_goes_on(tmp_path):
  slow = ('--set', 'step_seconds=0.05')
  process = sweeps.start(tmp_path, *TWELVE, *slow)
  sweeps.until(lambda: len(sweeps.results(tmp_path / 's')) >= 2 and sweeps.working(tmp_path / 's'))
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=sweeps.SECONDS)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'SIGTERM: passed on to the runs, which saved' in err and ' stopped' in err
  assert (tmp_path / 's' / 'sweep.html').is_file()
  assert sweeps.sweep(tmp_path, *TWELVE, *slow)[0] == 0
  sweeps.check_ended_once(tmp_path / 's', 12)


def test_a_run_that_crashes_does_not_stop_the_others_and_is_tried_again(tmp_path):
  four = ('--set', ':bits=2,3', '--set', 'seed=0,1', '--set', 'crashing_seeds=(1,)', '--workers', '2')
  code, out, err = sweeps.sweep(tmp_path, *four)
  assert code == 1
  assert '2 of 4 runs did not finish' in err and 'Traceback' not in err
  assert 'failed with exit code 1. ValueError: the batch of 9999 is larger than the data. The rest goes on' in out
  assert {r['status'] for r in sweeps.rows(tmp_path / 's') if r['seed'] == '1'} == {'failed'}
  sweeps.check_ended_once(tmp_path / 's', 2)
  code, out, _ = sweeps.sweep(tmp_path, *four)
  assert code == 1 and '4 runs, 2 of them finished before' in out
  assert {r['starts'] for r in sweeps.rows(tmp_path / 's') if r['seed'] == '1'} == {'2'}


def test_combinations_of_one_config_run_once(tmp_path):
  code, out, _ = sweeps.sweep(tmp_path, '--set', ':bits=2,3', '--set', 'recipe.weight_bits=4', '--set',
                              'recipe.input_bits=4')
  assert code == 0 and '1 more combinations have the config of another' in out
  sweeps.check_ended_once(tmp_path / 's', 1)


@pytest.mark.slow
def test_a_config_that_ran_under_other_words_is_not_run_again(tmp_path):
  assert sweeps.sweep(tmp_path, '--set', ':bits=2,3')[0] == 0
  code, out, _ = sweeps.sweep(tmp_path, '--set', ':bits=2,3', '--set', 'seed=0,1')
  assert code == 0 and '4 runs, 2 of them finished before' in out
  sweeps.check_ended_once(tmp_path / 's', 4)


def test_dry_run_starts_nothing(tmp_path):
  code, out, _ = sweeps.sweep(tmp_path, *TWELVE, '--dry_run')
  assert code == 0 and not (tmp_path / 's').exists()
  first = out.splitlines()[0]
  assert first.startswith(f'python tests/launch/program.py --config {sweeps.CONFIG}:bits=2 --config.seed=0 --workdir ')
  assert len(out.splitlines()) == 12


def test_one_sweep_of_a_study_at_a_time(tmp_path):
  first = sweeps.start(tmp_path, '--set', 'step_seconds=1.0')
  sweeps.until(lambda: sweeps.working(tmp_path / 's'))
  code, _, err = sweeps.sweep(tmp_path, '--set', 'step_seconds=1.0')
  first.send_signal(signal.SIGTERM)
  first.communicate(timeout=sweeps.SECONDS)
  assert code == 2 and f'process {first.pid} of this machine sweeps it already' in err


@pytest.mark.parametrize('argv, words', [
    (['--set', 'sead=0..4'], "Key 'sead': tests/launch/config.py has none of that name. Did you mean 'seed'?"),
    (['--search', 'optimizer.lr=log:1e-4..1'], "Did you mean 'optimizer.learning_rate'?"),
    (['--set', ':bitz=2'], "Did you mean 'bits'?"), (['--set', 'seed=0,one'], 'does not fit'),
    (['--set', 'seed=0', '--set', 'seed=1'], 'is given twice'),
    (['--set', 'seed=0,1', '--search', 'seed=0..9'], 'both'),
    (['--search', 'seed=0.5..9'], 'does not fit'), (['--config', 'configs/digitz.py'], 'does not exist'),
    (['--search', 'seed=0..9', '--trials', '0'], 'whole number of 1 or more'),
    (['--study', 'a/b'], 'Write --study a_b, and --folder'),
    (['--launcher', 'tpu_pod'], 'Option pods is not given'), (['--option', 'a=1'], "Option 'a': launch.local has none"),
    (['--search', 'optimizer.learning_rate=0.1..1', '--storage', 'postgresql://localhost:1/none'], '--storage'),
    (['--search', 'optimizer.learning_rate=0.1..1', '--storage', 'sqlite:////nowhere/a.db'], 'cannot be reached'),
    (['--search', 'optimizer.learning_rate=0.1..1', '--storage', 'nonsense'], 'cannot be reached')])
def test_wrong_input_is_one_paragraph_and_starts_nothing(tmp_path, monkeypatch, capfd, argv, words):
  monkeypatch.chdir(sweeps.ROOT)
  assert sweep.main(sweeps.arguments(tmp_path, *argv)) == 2
  err = capfd.readouterr().err
  assert words in err and len(err.splitlines()) == 1 and 'Traceback' not in err
  assert not list(tmp_path.glob('*/*/log.txt'))


def test_an_engine_that_is_not_installed_says_so(tmp_path):
  """A package of its name that raises stands before the real one, if there is one."""
  (tmp_path / 'ray.py').write_text('raise ImportError("none")')
  code, _, err = sweeps.sweep(tmp_path, '--launcher', 'ray', PYTHONPATH=str(tmp_path))
  assert code == 2 and 'launch.ray needs ray, which is not installed. Run: pip install ray' in err
  command = [sys.executable, '-m', 'launch.sky', '--option', 'bucket=s3://b', 'qat train --workdir runs/a']
  ended = subprocess.run(command, cwd=tmp_path, env=dict(PYTHONPATH=str(sweeps.ROOT), PATH=os.defpath),
                         capture_output=True, text=True)
  assert ended.returncode == 2 and "needs the program 'sky', which is not installed" in ended.stderr


def test_the_page_stands_alone_and_shows_every_run(tmp_path):
  assert sweeps.sweep(tmp_path, *TWELVE)[0] == 0
  text = (tmp_path / 's' / 'sweep.html').read_text()
  page = test_report.Page(text)
  assert page.tags.count('img') == 3 and all(link.startswith('data:image/png;base64,') for link in page.links)
  assert 'http' not in text and not {'script', 'link', 'iframe'} & set(page.tags)
  said = ' '.join(page.text)
  assert 'bits 4: accuracy 0.939 ± 0.0013 over 4 runs' in said  # 1 - 1/16 + mean of 0, 0.001, 0.002, 0.003.
  assert page.tags.count('tr') == 13
