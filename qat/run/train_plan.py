"""What training takes of memory, before anything is run: `qat train --plan`.

The very step that would train is compiled of shapes alone (memory_plan.py). A decoder is compiled at 2 and at 3 blocks,
and what a block adds is added for each that is left. Where inputs have learned or static ranges, which numbers must
have gone through first, the network is built and shown one example of random numbers. No data needs to be there.
"""

import jax
from flax import nnx
import jax.numpy as jnp
import numpy as np

from qat.nn import calibrate
from qat.nn import recipes
from qat.nn import transform
from qat.run import build
from qat.run import data
from qat.run import memory_plan
from qat.run import optim
from qat.run import report
from qat.run import state as states


def plan(config):
  """The memory_plan.Plan of a config of `qat train`, on one device."""
  layers = config.model.get('layers', 0) if config.model.name.startswith('decoder.') else 0
  depths = memory_plan.DEPTHS if layers > memory_plan.DEPTHS[1] else (layers, layers)
  parts = [measured(at_depth(config, n) if layers else config) for n in dict.fromkeys(depths)]
  low, high = parts[0], parts[-1]
  found = {what: high[what] + (layers - depths[1]) * (high[what] - low[what]) for what in high}
  c = config.optimizer
  title = (f'{config.model.name}: {report.recipe_name(config.recipe.to_dict())}, {config.data.batch_size} examples in '
           f'{c.accumulate_steps} parts, {config.model.dtype}, {c.name} in {c.state_bits} bits, as '
           f'{jax.default_backend()} runs it')
  return memory_plan.Plan(title, found, {})


def at_depth(config, layers):
  """A copy of a config, of so many blocks."""
  config = config.copy_and_resolve_references()
  config.unlock().model.layers = layers
  return config


def measured(config):
  """{what: bytes} of the step of a config."""
  batch, goal = batch_of(config), build.objective(config)
  skeleton, params, rest = states.take_apart(network(config, goal, batch))
  params, rest = jax.eval_shape(lambda *x: x, params, rest)
  tx, _ = optim.optimizer(config, params)
  state = jax.eval_shape(lambda params, rest: states.new(params, rest, tx), params, rest)
  step = states.base_step(skeleton, goal, tx, config.optimizer.accumulate_steps)
  xla = step.lower(state, skeleton.base, batch).compile().memory_analysis()
  gradients = memory_plan.size(params)
  return {'weights': memory_plan.size(params), 'ranges and statistics': memory_plan.size(rest),
          'gradients': gradients, 'optimizer': memory_plan.size(state.opt_state), 'batch': memory_plan.size(batch),
          'activations and workspace': max(xla.temp_size_in_bytes - gradients, 0)}


def network(config, goal, batch):
  """The network that would train: of shapes alone, unless its ranges need numbers."""
  rules = recipes.resolve(config.recipe.to_dict()) if config.recipe else ()
  on_grid = lambda model: transform.quantize(model, rules, config.get('compute', 'low_bit')) if rules else model
  make = lambda: on_grid(build.float_model(config))
  if not any(getattr(q, 'observer', None) for rule in rules for q in (rule.input, rule.scores, rule.cache)):
    return nnx.eval_shape(make)
  random = np.random.default_rng(0)
  example = {name: random.normal(size=(1, *x.shape[1:])).astype(x.dtype) for name, x in batch.items()}
  return calibrate.calibrate(make(), [goal.inputs(example)])


def batch_of(config):
  """{key: jax.ShapeDtypeStruct} of a batch; of data that is not there, what it would have."""
  c, b = config.data, config.data.batch_size
  shape = jax.ShapeDtypeStruct
  if c.name in ('c4', 'wikitext'):
    return {'tokens': shape((b, c.options.length + 1), jnp.int32)}
  if c.name in ('imagenet2012', 'cifar10'):
    size = c.options.get('size', 32)
    return {'image': shape((b, size, size, 3), jnp.float32), 'label': shape((b,), jnp.int32),
            'targets': shape((b, config.model.classes), jnp.float32)}
  source = data.load(c.name, c.train, data_dir=c.data_dir, **{**c.options, **c.train_options})
  return jax.eval_shape(lambda: {name: jnp.asarray(x) for name, x in source.take(np.zeros(b, np.int64)).items()})
