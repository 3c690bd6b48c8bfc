"""One writer interface: TensorBoard always; W&B and MLflow are told the same, once a step."""

import importlib
import json
import pathlib
import types

import ml_collections
import pytest

from qat.run import cli
from qat.run import metrics
from qat.run import trackers

TINY = str(pathlib.Path(__file__).with_name('tiny.py'))


def config(*names):
  return ml_collections.ConfigDict(dict(trackers=names, optimizer=dict(name='adamw'), sizes=(64, 10)))


def write(workdir, names, start, stop):
  with metrics.Metrics(workdir, start, config(*names)) as log:
    for step in range(start + 1, stop + 1):
      log.write(step, 'train', dict(loss=1 / step))
    log.write(stop, 'test', dict(accuracy=0.5))


class FakeRun:
  """What the W&B tracker uses of a run."""

  def __init__(self, store, id):
    self.rows, self.ended = store.setdefault(id, {}), False

  @property
  def step(self):
    return max(self.rows, default=0)

  def log(self, values, step):
    assert step >= self.step, 'W&B takes no earlier step'
    self.rows.setdefault(step, {}).update(values)

  def finish(self):
    self.ended = True


@pytest.fixture
def fakes(monkeypatch):
  """Stand-ins for both packages, which keep what they are told: {'wandb': {id: ...}, 'mlflow': {id: [...]}}."""
  kept = dict(wandb={}, mlflow={}, params={})

  class Client:
    def get_experiment_by_name(self, name):
      return None

    def create_experiment(self, name):
      return '1'

    def create_run(self, experiment, run_name):
      id = f'run{len(kept["mlflow"])}'
      kept['mlflow'][id] = []
      return types.SimpleNamespace(info=types.SimpleNamespace(run_id=id))

    def log_param(self, id, key, value):
      kept['params'][key] = value

    def get_metric_history(self, id, key):
      return [types.SimpleNamespace(step=s) for k, _, s in kept['mlflow'][id] if k == key]

    def log_metric(self, id, key, value, step):
      kept['mlflow'][id].append((key, value, step))

    def set_terminated(self, id):
      pass

  def init(**options):
    assert options['resume'] == 'allow' and options['config']['sizes'] == [64, 10]
    return FakeRun(kept['wandb'], options['id'])

  packages = dict(mlflow=types.SimpleNamespace(MlflowClient=Client),
                  wandb=types.SimpleNamespace(init=init, Settings=lambda **_: None))
  real = importlib.import_module
  monkeypatch.setattr(trackers.importlib, 'import_module', lambda name, *package: packages.get(name) or real(
      name, *package))
  return kept


def test_all_are_told_the_same_and_a_run_that_goes_on_repeats_nothing(tmp_path, fakes):
  write(tmp_path, ('wandb', 'mlflow'), 0, 5)
  write(tmp_path, ('wandb', 'mlflow'), 3, 7)  # Killed at 5, gone on from the checkpoint of 3.
  losses = {step: 1 / step for step in range(1, 8)}
  rows, = fakes['wandb'].values()
  assert {step: row['train/loss'] for step, row in rows.items()} == losses
  told, = fakes['mlflow'].values()
  assert [(v, s) for k, v, s in told if k == 'train/loss'] == [(v, s) for s, v in losses.items()]
  assert [s for k, _, s in told if k == 'test/accuracy'] == [5, 7]
  assert fakes['params'] == {'trackers': "['wandb', 'mlflow']", 'optimizer.name': 'adamw', 'sizes': '[64, 10]'}
  assert list((tmp_path / 'tensorboard').glob('events*'))
  assert {line['step']: line['loss'] for line in metrics.read(tmp_path) if line['split'] == 'train'} == losses


def test_tensorboard_alone_unless_told(tmp_path):
  write(tmp_path, (), 0, 2)
  assert list((tmp_path / 'tensorboard').glob('events*')) and not (tmp_path / 'trackers.json').exists()


@pytest.mark.parametrize('names, words', [
    (('wandbb',), "Did you mean 'wandb'?"), (('tensorbord',), 'TensorBoard is always on')])
def test_wrong_names(tmp_path, names, words):
  with pytest.raises(ValueError) as error:
    metrics.Metrics(tmp_path, 0, config(*names))
  assert words in str(error.value)


def test_a_package_that_is_not_installed_is_one_paragraph(tmp_path, monkeypatch, capfd):
  real = importlib.import_module

  def missing(name, *package):
    if name == 'wandb':
      raise ImportError(name)
    return real(name, *package)
  monkeypatch.setattr(trackers.importlib, 'import_module', missing)
  assert cli.main(['train', f'--config={TINY}', f'--workdir={tmp_path}', "--config.trackers=('wandb',)"]) == 2
  said = capfd.readouterr().err.strip()
  assert len(said.splitlines()) == 1
  assert "config.trackers 'wandb': the package is not installed. Run: pip install wandb" in said


def test_a_server_that_does_not_answer_is_told(tmp_path, fakes, monkeypatch):
  def init(**_):
    raise RuntimeError('api key not configured')
  monkeypatch.setattr(trackers.installed('wandb'), 'init', init)
  with pytest.raises(ValueError, match="'wandb' cannot be opened: api key not configured. Check its login"):
    metrics.Metrics(tmp_path, 0, config('wandb'))


def test_mlflow_itself(tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
  mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/mlflow.db')
  write(tmp_path, ('mlflow',), 0, 5)
  write(tmp_path, ('mlflow',), 3, 7)
  id = json.loads((tmp_path / 'trackers.json').read_text())['mlflow']
  history = mlflow.MlflowClient().get_metric_history(id, 'train/loss')
  assert [(m.step, m.value) for m in history] == [(s, 1 / s) for s in range(1, 8)]
  assert mlflow.get_run(id).data.params['optimizer.name'] == 'adamw'


def test_wandb_itself(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  write(tmp_path, ('wandb',), 0, 5)
  assert list(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))
