"""Rates of learning that optax has not, beside those it has: what `schedule.name` of a config may be."""

import jax.numpy as jnp
import optax

from qat.run import names

SECOND_STAGE = 2 / 3  # Rates of 1.5e-3 and then 1e-3.


def two_stage_linear(init_value, decay_steps, second=SECOND_STAGE):
  """step -> rate: a line from `init_value` down to 0, of which `second` is taken from the middle of its steps on.

  Ma et al. The Era of 1-bit LLMs: Training Tips, Code and FAQ, 2024: networks of ternary weights move at high rates for
  as long as their signs are to change, and settle at lower ones.
  """
  def rate(step):
    left = 1 - jnp.minimum(step, decay_steps) / decay_steps
    return init_value * left * jnp.where(step < decay_steps / 2, 1.0, second)
  return rate


OWN = {'two_stage_linear': two_stage_linear}


def find(name):
  """The schedule of a name: one of OWN, or optax's."""
  if name in OWN:
    return OWN[name]
  if '.' not in name and not hasattr(optax, name):
    there = [n for n in dir(optax) if n.endswith('schedule')]
    raise ValueError(f'schedule.name {name!r}: there is none of that name. {names.suggest(name, [*OWN, *there])}')
  return names.resolve(optax, name, 'schedule.name')
