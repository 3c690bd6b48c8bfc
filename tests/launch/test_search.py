"""Searches: what Optuna is told, what is cut short, and what goes on after a kill."""

import signal

import optuna
import pytest

from launch import search
from launch import sweep
from tests.launch import sweeps

STATES = optuna.trial.TrialState
RATE = ('--search', 'optimizer.learning_rate=log:1e-4..1e0')


def trials(folder, name='s'):
  """The trials of a study, as Optuna tells of them."""
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  storage = optuna.storages.RDBStorage(f'sqlite:///{folder}/s/optuna.db')
  found = optuna.load_study(study_name=name, storage=storage).trials
  storage.remove_session()
  storage.engine.dispose()
  return found


@pytest.mark.parametrize('sampler', ['tpe', pytest.param('random', marks=pytest.mark.slow)])
def test_a_search_finds_the_best_rate_and_optuna_holds_the_runs_numbers(tmp_path, sampler):
  code, out, err = sweeps.sweep(tmp_path, *RATE, '--trials', '12', '--sampler', sampler, '--workers', '2')
  assert code == 0, err
  found = trials(tmp_path)
  assert [t.state for t in found] == [STATES.COMPLETE] * 12
  rows = {row['trial']: row for row in sweeps.rows(tmp_path / 's')}
  for trial in found:
    assert trial.value == float(rows[str(trial.number)]['accuracy'])
    rate = float(rows[str(trial.number)]['learning_rate'])
    assert trial.params['optimizer.learning_rate'] == pytest.approx(rate, 1e-5)
  best = max(found, key=lambda t: t.value).params['optimizer.learning_rate']
  assert 1e-3 < best < 1e-1  # It is 1e-2.
  assert '12/12 finished' in out


def test_a_search_that_is_killed_goes_on_with_the_trials_that_it_left(tmp_path):
  slow = (*RATE, '--trials', '10', '--workers', '2', '--set', 'step_seconds=0.05')
  name = 's/step_seconds=0.05'
  process = sweeps.start(tmp_path, *slow)
  sweeps.until(lambda: len(sweeps.results(tmp_path / 's')) >= 4)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  left = [t for t in trials(tmp_path, name) if t.state is STATES.RUNNING]
  assert 1 <= len(left) <= 2
  code, _, err = sweeps.sweep(tmp_path, *slow)
  assert code == 0, err
  sweeps.check_ended_once(tmp_path / 's', 10)
  found = trials(tmp_path, name)
  assert sum(t.state is STATES.COMPLETE for t in found) == 10
  again = [t.params for t in found if t.state is STATES.COMPLETE and t.number > max(x.number for x in left)]
  assert all(t.params in again for t in left if t.params)
  assert sweeps.sweep(tmp_path, *slow)[0] == 0  # Nothing is left to do.
  assert len(trials(tmp_path, name)) == len(found)


@pytest.mark.parametrize('pruner', ['asha', pytest.param('hyperband', marks=pytest.mark.slow)])
def test_pruning_stops_runs_that_fall_behind(tmp_path, pruner):
  code, out, err = sweeps.sweep(tmp_path, *RATE, '--trials', '8', '--pruner', pruner, '--sampler', 'random', '--set',
                                'step_seconds=0.3', '--workers', '4', '--seed', '1')
  assert code == 0, err
  found = trials(tmp_path, 's/step_seconds=0.3')
  cut = [t for t in found if t.state is STATES.PRUNED]
  assert cut and len(cut) + sum(t.state is STATES.COMPLETE for t in found) == 8
  statuses = {row['trial']: row['status'] for row in sweeps.rows(tmp_path / 's')}
  for trial in cut:
    assert statuses[str(trial.number)] == 'pruned'
    assert trial.intermediate_values and max(trial.intermediate_values) < 5  # Of five evaluations.
  best = max(found, key=lambda t: t.value or 0)
  assert best.state is STATES.COMPLETE


@pytest.mark.slow
def test_each_combination_has_a_search_of_its_own(tmp_path):
  code, _, err = sweeps.sweep(tmp_path, '--set', ':bits=2,4', *RATE, '--trials', '3')
  assert code == 0, err
  for bits in '24':
    assert [t.state for t in trials(tmp_path, f's/bits={bits}')] == [STATES.COMPLETE] * 3
  sweeps.check_ended_once(tmp_path / 's', 6)


@pytest.mark.slow
def test_choices_that_come_again_are_not_run_again(tmp_path):
  code, _, err = sweeps.sweep(tmp_path, '--search', 'optimizer.learning_rate=0.1,0.01', '--trials', '6')
  assert code == 0, err
  assert [t.state for t in trials(tmp_path)] == [STATES.COMPLETE] * 6
  assert len(sweeps.results(tmp_path / 's')) <= 2


@pytest.mark.slow
def test_a_trial_that_crashes_counts_once_and_is_tried_again_by_the_same_command(tmp_path):
  argv = ('--search', 'seed=0..3', '--trials', '4', '--sampler', 'random', '--set', 'crashing_seeds=(0,1,2,3)')
  code, _, err = sweeps.sweep(tmp_path, *argv)
  assert code == 1 and 'did not finish' in err
  name = 's/crashing_seeds=(0,1,2,3)'
  assert [t.state for t in trials(tmp_path, name)] == [STATES.FAIL] * 4
  assert sweeps.sweep(tmp_path, *argv)[0] == 1
  found = trials(tmp_path, name)
  assert len(found) == 8 and [t.params for t in found[4:]] == [t.params for t in found[:4]]


@pytest.mark.parametrize('name, kind', [('none', 'NopPruner'), ('asha', 'SuccessiveHalvingPruner'),
                                        ('hyperband', 'HyperbandPruner'), ('median', 'MedianPruner')])
def test_names_of_pruners(name, kind):
  assert isinstance(search.pruners(evaluations=5)[name](), getattr(optuna.pruners, kind))


def test_a_storage_that_is_lost_on_the_way_is_told(tmp_path, monkeypatch, capfd):
  def lost(*_):
    raise optuna.exceptions.StorageInternalError('server closed the connection')
  monkeypatch.setattr(sweep, 'sweep', lost)
  assert sweep.main(sweeps.arguments(tmp_path, *RATE)) == 2
  err = capfd.readouterr().err
  assert 'the storage of trials was lost: server closed the connection What ran has saved' in err
  assert len(err.splitlines()) == 1


def test_evaluations_are_counted():
  assert search.evaluations(dict(total_steps=10, eval=dict(every_steps=3))) == 4
  assert search.evaluations(dict(method='gptq')) == 1


def test_a_metric_that_results_lack_is_told(tmp_path):
  code, out, _ = sweeps.sweep(tmp_path, *RATE, '--trials', '2', '--metric', 'acuracy')
  assert "--metric acuracy is None in its result, which has ['accuracy']" in out
  assert [t.state for t in trials(tmp_path)] == [STATES.FAIL] * 2


@pytest.mark.slow
def test_a_journal_on_a_shared_disk(tmp_path):
  storage = f'journal:{tmp_path}/journal.log'
  code, _, err = sweeps.sweep(tmp_path, *RATE, '--trials', '2', '--storage', storage)
  assert code == 0, err
  backend = optuna.storages.journal.JournalFileBackend(f'{tmp_path}/journal.log')
  study = optuna.load_study(study_name='s', storage=optuna.storages.JournalStorage(backend))
  assert len(study.trials) == 2 and (tmp_path / 's' / 'optuna.db').exists() is False
