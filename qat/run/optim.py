"""Optimizer, schedule and parameter groups, all of optax, all named by the config.

Groups are an ordered table of (regex over whole paths, settings); the first match wins, and a
regex that matches nothing is an error. Two rules stand behind the table: the variables of
quantizers (learned steps and clip points) move at `quantizer_rate_scale` of the rate and have no
weight decay, nor has anything with fewer than two axes (biases, norms). Nothing decays after the share
`optimizer.weight_decay_until` of all steps.
"""

import inspect
import re

import jax.numpy as jnp
import optax

from qat.run import eight_bit
from qat.run import names
from qat.run import schedules

SETTINGS = ('learning_rate_scale', 'weight_decay')
CONSTANT_DECAY = ('novograd',)  # Of those in optax that decay, those whose decay is no function of the step.


def optimizer(config, params):
  """(optax transformation, schedule: step -> learning rate) for `params`, {path: array}."""
  c = config.optimizer
  rate = schedule(config)
  settings = {path: _settings(path, x, c) for path, x in params.items()}
  _check_groups(c, settings)
  decays = _decays(c, config.total_steps)
  groups = {str(s): _member(c, rate, s[0], decays(s[1])) for s in settings.values()}
  labels = {path: str(s) for path, s in settings.items()}  # A tuple would be read as a tree.
  tx = optax.partition(groups, labels)
  return (optax.chain(optax.clip_by_global_norm(c.clip_norm), tx) if c.clip_norm else tx), rate


def schedule(config):
  """step -> learning rate: a linear warmup, then the named schedule over what is left."""
  c = config.schedule
  peak, left = config.optimizer.learning_rate, config.total_steps - c.warmup_steps
  if left < 1:
    raise ValueError(f'schedule.warmup_steps {c.warmup_steps} leaves nothing of total_steps {config.total_steps}. '
                     'Warm up for fewer steps.')
  make = schedules.find(c.name)
  given = {k: v for k, v in c.items() if k not in ('name', 'warmup_steps')}
  known = dict(init_value=peak, value=peak, decay_steps=left, transition_steps=left)
  accepted = _parameters(make)
  settings = {**{k: v for k, v in known.items() if k in accepted}, **given}
  _check_settings('schedule', c.name, given, accepted)
  rate = make(**settings)
  if not c.warmup_steps:
    return rate
  return optax.join_schedules([optax.linear_schedule(0.0, peak, c.warmup_steps), rate], [c.warmup_steps])


def _member(c, rate, learning_rate_scale, weight_decay):
  """The named optimizer for one group."""
  if not learning_rate_scale:
    return optax.set_to_zero()
  make = names.resolve(optax, c.name, 'optimizer.name')
  accepted, options = _parameters(make), dict(c.options)
  _check_settings('optimizer.options', c.name, options, accepted)
  scaled, states = lambda step: learning_rate_scale * rate(step), _states(c.state_bits)
  if 'weight_decay' in accepted:
    return states(make(scaled, weight_decay=weight_decay, **options))
  # sgd and the like: decay joins the gradient before the step, as in the L2 penalty.
  return optax.chain(optax.add_decayed_weights(weight_decay), states(make(scaled, **options)))


def _decays(c, total_steps):
  """weight decay -> itself, or step -> it where it ends at `weight_decay_until` of all steps."""
  until = c.get('weight_decay_until', 1.0)                               # qat finetune has no such leaf.
  if not 0 <= until <= 1:
    raise ValueError(f'optimizer.weight_decay_until {until}: it is a share of all steps. Give 0 to 1.')
  if until < 1 and c.name in CONSTANT_DECAY:
    raise ValueError(f'optimizer.weight_decay_until {until}: the decay of {c.name!r} is a constant. Take adamw, or 1.')
  if until == 1:
    return lambda decay: decay
  return lambda decay: lambda step: jnp.where(step < until * total_steps, decay, 0.0)


def _states(bits):
  """transformation -> the same, its moments kept in so many bits."""
  kinds = {32: lambda tx: tx, 8: eight_bit.eight_bit}
  if bits not in kinds:
    raise ValueError(f'optimizer.state_bits {bits}: moments are kept in 32 or 8 bits. Give one of these.')
  return kinds[bits]


def _settings(path, x, c):
  """(learning_rate_scale, weight_decay) of one parameter."""
  learned = '/quantizers/' in path
  default = dict(learning_rate_scale=c.quantizer_rate_scale if learned else 1.0,
                 weight_decay=c.weight_decay if x.ndim >= 2 and not learned else 0.0)
  group = next((settings for regex, settings in c.groups if re.fullmatch(regex, path)), {})
  merged = {**default, **group}
  return tuple(float(merged[k]) for k in SETTINGS)


def _check_groups(c, labels):
  """Every group must match a parameter, and set only what there is to set."""
  for regex, settings in c.groups:
    _check_settings('optimizer.groups', regex, settings, SETTINGS)
  first = {path: next((r for r, _ in c.groups if re.fullmatch(r, path)), None) for path in labels}
  if unused := [regex for regex, _ in c.groups if regex not in first.values()]:
    raise ValueError(f'No parameter is left for the optimizer.groups {unused}. The parameters are {sorted(labels)}. '
                     'Correct the regex (it must match the whole path), or drop the group.')


def _parameters(make):
  return list(inspect.signature(make).parameters)


def _check_settings(where, name, given, accepted):
  for key in given:
    if key not in accepted:
      raise ValueError(f'{where}: {name!r} has no setting {key!r}. {names.suggest(key, accepted)}')
