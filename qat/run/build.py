"""From a config to what it names: data, model, quantizers, optimizer."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil

from flax import nnx
import jax.numpy as jnp

from qat import models
from qat.nn import calibrate
from qat.nn import explain
from qat.nn import recipes
from qat.nn import transform
from qat.run import checkpoint
from qat.run import config as configs
from qat.run import data
from qat.run import mesh
from qat.run import names
from qat.run import objectives
from qat.run import optim
from qat.run import scorer
from qat.run import state as states


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that a config stands for, before any checkpoint is read."""
  config: object
  objective: object
  train: object          # source of training examples
  skeleton: states.Skeleton
  state: states.TrainState
  tx: object
  rate: object           # step -> learning rate
  scorer: scorer.Scorer
  memory: str | None = None  # Where the optimizer's state lives, see offload.py.
  devices: mesh.OneDevice = mesh.ONE
  about: dict = dataclasses.field(default_factory=dict)  # What checkpoints say besides: the fingerprint of a base.

  def model(self, state):
    """The network that holds the arrays of `state`."""
    return self.skeleton.join(state.params, state.rest)


def run(config, devices=mesh.ONE):
  """The Run of a config: data, model, quantizers, calibration, optimizer, state, in its places on `devices`."""
  if 'adapter' in config:
    raise ValueError('The config is one of qat finetune. Give the qat finetune command again: it goes on with what is '
                     'there, scores it, and writes its report.')
  goal = objective(config)
  train, test = sources(config)
  model = float_model(config)
  if config.init_from:
    model = pretrained(model, config.init_from)
  model = devices.constrained(quantized(model, config, train))
  skeleton, params, rest = states.take_apart(model)
  tx, rate = optim.optimizer(config, params)
  test_scorer = scorer.Scorer(goal, test, config.eval.batch_size, devices)
  skeleton, state = devices.begin(model, skeleton, params, rest, tx)
  return Run(config, goal, train, skeleton, state, tx, rate, test_scorer, devices=devices)


def pretrained(model, workdir):
  """`model` with the parameters of the best checkpoint of a float run."""
  config = configs.load(workdir)
  if 'merged' in config:
    raise ValueError(f'init_from {str(workdir)!r}: it was left by qat merge, and qat train begins from float runs of '
                     'its own. Give it as `pretrained` to qat finetune or qat ptq.')
  step = checkpoint.best_step(workdir, objective(config).score)
  if config.recipe or step is None:
    what = f'its recipe is {config.recipe.to_dict()}' if config.recipe else 'it has no evaluated checkpoint'
    raise ValueError(f'init_from {workdir!r}: {what}. Name the workdir of a finished float run.')
  skeleton, params, rest = states.take_apart(model)
  found, _ = checkpoint.read_part(workdir, step, dict(params=params, rest=rest))
  return skeleton.join(found['params'], found['rest'])


def objective(config):
  """What the run minimizes."""
  return names.resolve(objectives, config.objective, 'objective')


def sources(config):
  """(training examples, test examples)."""
  c = config.data
  train = data.load(c.name, c.train, data_dir=c.data_dir, **{**c.options, **c.train_options})
  _check_sizes(train, config)
  return train, data.load(c.name, c.test, data_dir=c.data_dir, **c.options)


def _check_sizes(source, config):
  """Raises where a source has tokens or classes that the network does not know: it would take others in their place."""
  for leaf in ('vocab_size', 'classes'):
    known, needed = config.model.get(leaf), getattr(source, leaf, 0)
    if known is not None and needed > known:
      raise ValueError(f'model.{leaf} {known}: the data has {needed}. Give --config.model.{leaf}={needed}, or other '
                       'data.')


def float_model(config):
  """The float network of `config.model`, initialized from `config.seed`."""
  settings = dict(config.model)
  name, dtype = settings.pop('name'), settings.pop('dtype')
  make = model_maker(name)
  parameters = inspect.signature(make).parameters
  if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    for key in settings:
      if key not in parameters:
        raise ValueError(f'model.{key}: {name} has no such setting. {names.suggest(key, parameters)}')
  return make(**settings, dtype=names.resolve(jnp, dtype, 'model.dtype'), rngs=nnx.Rngs(config.seed))


def model_maker(name):
  """The class or function of 'mlp.MLP': a file of qat/models, then what is in it."""
  files = [m.name for m in pkgutil.iter_modules(models.__path__)]
  file, _, thing = name.partition('.')
  if file not in files or not thing:
    raise ValueError(f'model.name {name!r}: it is not <file of qat/models>.<class>. {names.suggest(file, files)}')
  return names.resolve(importlib.import_module(f'{models.__name__}.{file}'), thing, 'model.name')


def quantized(model, config, source):
  """`model` under `config.recipe`, its ranges calibrated on the first training batches.

  Args:
    model: a float network.
    config: with `recipe`, a dict that qat.nn.recipes.resolve reads, empty to stay in floats.
    source: the training examples.
  """
  if not config.recipe:
    return model
  model = transform.quantize(model, recipes.resolve(config.recipe.to_dict()), config.get('compute', 'low_bit'))
  batches = data.batches(source, config.data.batch_size, seed=config.seed, shuffle=True, repeat=True)
  some = itertools.islice(batches, config.calibrate_batches)
  inputs = objective(config).inputs
  return calibrate.calibrate(model, [inputs(batch) for batch in some])


def facts(run, model):
  """What a trained model costs, and what freezing shows: its scores, and that its outputs are those of training."""
  about = explain.explain(model)
  cost = dict(bits_per_weight=about.bits_per_weight, size_bytes=about.size_bytes)
  if not run.config.recipe:
    return cost
  frozen = transform.freeze(model)
  return dict(cost, frozen_metrics=run.scorer(frozen), **run.scorer.differences(model, frozen))
