"""Where metrics are shown besides metrics.jsonl: TensorBoard always, and what `config.trackers` names.

    --config.trackers="('wandb', 'mlflow')"

Both read where to go from their own environment (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME). A run that goes on after a kill goes on under the same name there; the steps that it repeats
have the same numbers, and are not written twice.
"""

import abc
import importlib
import json
import os
import uuid

import tensorboardX

from qat.run import names

PROJECT = 'qat'          # Where the environment names none.
IDS = 'trackers.json'    # In the workdir: each tracker's own name for this run.
PARAM_LETTERS = 500      # That MLflow's stores keep of a parameter.


class Tracker(abc.ABC):
  """Shows scalars. Invariant: each (step, name) is shown once, however often the run was killed."""

  @abc.abstractmethod
  def write(self, step, values):
    """Shows {'split/name': number} of a step."""

  @abc.abstractmethod
  def close(self):
    """Waits until everything is where it belongs."""


class TensorBoard(Tracker):
  """Events in workdir/tensorboard; those after `step` are of a run that was killed, and go."""

  def __init__(self, workdir, step):
    self.board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=30)

  def write(self, step, values):
    for name, value in values.items():
      self.board.add_scalar(name, value, step)

  def close(self):
    self.board.close()


class WandB(Tracker):
  """Weights & Biases. It takes steps in their order only, and drops by itself those that are repeated."""

  def __init__(self, workdir, config):
    wandb = installed('wandb')
    self.run = wandb.init(project=os.environ.get('WANDB_PROJECT', PROJECT), name=workdir.name, dir=str(workdir),
                          id=identity(workdir, 'wandb', lambda: uuid.uuid4().hex), resume='allow', config=config,
                          settings=wandb.Settings(silent=True))

  def write(self, step, values):
    if step >= self.run.step:  # Else it warns of each.
      self.run.log(values, step=step)

  def close(self):
    self.run.finish()


class MLflow(Tracker):
  """MLflow. It keeps whatever it is given, so that steps it has are left out here."""

  def __init__(self, workdir, config):
    mlflow = installed('mlflow')
    self.client, self.last = mlflow.MlflowClient(), {}
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
    there = self.client.get_experiment_by_name(name)
    experiment = there.experiment_id if there else self.client.create_experiment(name)
    self.id = identity(workdir, 'mlflow', lambda: self._create(experiment, workdir.name, config))

  def _create(self, experiment, name, config):
    """The id of a new run, with the config's leaves as its parameters."""
    run = self.client.create_run(experiment, run_name=name)
    for key, value in flat(config):
      self.client.log_param(run.info.run_id, key, str(value)[:PARAM_LETTERS])
    return run.info.run_id

  def write(self, step, values):
    for name, value in values.items():
      if name not in self.last:
        seen = self.client.get_metric_history(self.id, name)
        self.last[name] = max((m.step for m in seen), default=-1)
      if step > self.last[name]:
        self.client.log_metric(self.id, name, float(value), step=step)
        self.last[name] = step

  def close(self):
    self.client.set_terminated(self.id)


TRACKERS = dict(wandb=WandB, mlflow=MLflow)


def opened(wanted, workdir, step, config):
  """[Tracker]: TensorBoard, and those of the names.

  Args:
    wanted: names of TRACKERS.
    workdir: pathlib.Path.
    step: that of the restored checkpoint, 0 for a new run.
    config: as JSON holds it.
  """
  for name in wanted:
    if name not in TRACKERS:
      raise ValueError(f'config.trackers {name!r}: there is none of that name; TensorBoard is always on. '
                       f'{names.suggest(name, TRACKERS)}')
    installed(name)
  found = [TensorBoard(workdir, step)]
  for name in wanted:
    try:
      found.append(TRACKERS[name](workdir, config))
    except Exception as error:  # Logins, networks and servers each raise kinds of their own.
      raise ValueError(f'config.trackers {name!r} cannot be opened: {str(error).strip() or type(error).__name__}. '
                       f'Check its login and address, or leave it out: --config.trackers="()".') from error
  return found


def installed(name):
  """The package of a tracker."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(f'config.trackers {name!r}: the package is not installed. Run: pip install {name}, or leave it '
                     'out: --config.trackers="()".') from error


def identity(workdir, name, make):
  """A tracker's name for the run in a workdir; `make` gives it the first time."""
  path = workdir / IDS
  known = json.loads(path.read_text()) if path.is_file() else {}
  if name not in known:
    known[name] = make()
    path.write_text(json.dumps(known) + '\n')
  return known[name]


def flat(tree, prefix=''):
  """Yields ('optimizer.name', value) of nested dicts."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value
