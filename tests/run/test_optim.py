"""Groups of parameters, schedules, and names of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import defaults
from qat.run import optim

PARAMS = {
    'layers/0/kernel': jnp.ones((2, 3)), 'layers/0/bias': jnp.ones(3),
    'layers/0/quantizers/kernel/step': jnp.ones((1, 3)), 'norm/scale': jnp.ones(3)}


def config(**changes):
  c = defaults.base()
  c.total_steps = 10
  with c.unlocked():
    c.optimizer.update(changes)
  return c


def moves(c):
  """How far each parameter moves in one step of zero gradient: decay alone."""
  tx, _ = optim.optimizer(c, PARAMS)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
  return {path: float(u.ravel()[0]) for path, u in updates.items()}


def test_only_kernels_decay_unless_a_group_says_so():
  """AdamW's decay is -learning_rate * weight_decay * parameter."""
  decayed = moves(config(learning_rate=0.1, weight_decay=0.5))
  assert decayed['layers/0/kernel'] == pytest.approx(-0.05)
  assert [p for p, m in decayed.items() if m] == ['layers/0/kernel']
  groups = ((r'.*/quantizers/.*', dict(weight_decay=0.2)),)
  decayed = moves(config(learning_rate=0.1, weight_decay=0.0, groups=groups))
  assert decayed['layers/0/quantizers/kernel/step'] == pytest.approx(-0.02)


def test_the_first_group_that_matches_wins():
  groups = ((r'layers/0/bias', dict(learning_rate_scale=0.0)), (r'layers/.*', dict(learning_rate_scale=2.0)))
  tx, _ = optim.optimizer(config(name='sgd', learning_rate=0.1, weight_decay=0.0, groups=groups, clip_norm=0.0), PARAMS)
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = tx.update(ones, tx.init(PARAMS), PARAMS)
  got = {path: round(float(u.ravel()[0]), 6) for path, u in updates.items()}
  assert got == {'layers/0/kernel': -0.2, 'layers/0/bias': 0.0, 'layers/0/quantizers/kernel/step': -0.2,
                 'norm/scale': -0.1}


def test_learned_steps_have_a_rate_of_their_own():
  c = config(name='sgd', learning_rate=0.1, weight_decay=0.0, quantizer_rate_scale=0.3, clip_norm=0.0)
  tx, _ = optim.optimizer(c, PARAMS)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
  assert float(updates['layers/0/quantizers/kernel/step'][0, 0]) == pytest.approx(-0.03)
  assert float(updates['layers/0/kernel'][0, 0]) == pytest.approx(-0.1)


@pytest.mark.parametrize('groups, words', [
    (((r'hed/.*', dict(weight_decay=0.0)),), 'No parameter is left for the optimizer.groups .*hed'),
    (((r'.*', dict(weight_decay=0.0)), (r'norm/.*', dict(weight_decay=0.1))), 'No parameter is left for .*norm'),
    (((r'.*', dict(weight_decai=0.0)),), "no setting 'weight_decai'. Did you mean 'weight_decay'"),
])
def test_a_group_without_effect_is_an_error(groups, words):
  with pytest.raises(ValueError, match=words):
    optim.optimizer(config(groups=groups), PARAMS)


def test_wrong_options_are_errors():
  with pytest.raises(ValueError, match="Did you mean 'adamw'"):
    optim.optimizer(config(name='adamww'), PARAMS)
  with pytest.raises(ValueError, match="'adamw' has no setting 'beta1'"):
    optim.optimizer(config(options=dict(beta1=0.9)), PARAMS)


def test_warmup_then_the_named_schedule():
  c = config(learning_rate=1.0)
  c.schedule.warmup_steps = 4
  rates = [float(optim.schedule(c)(step)) for step in range(11)]
  np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1.0])
  np.testing.assert_allclose(rates[7], 0.5, atol=1e-6)  # Halfway down the cosine: step 4 + 3 of 6.
  np.testing.assert_allclose(rates[10], 0.0, atol=1e-6)


def test_two_stages_are_two_lines_to_zero():
  c = config(learning_rate=1.5e-3)
  c.total_steps, c.schedule.name = 12, 'two_stage_linear'
  c.schedule.warmup_steps = 2
  rates = [float(optim.schedule(c)(step)) for step in range(13)]
  np.testing.assert_allclose(rates[2:7], 1.5e-3 * np.linspace(1, 0.6, 5), rtol=1e-6)
  np.testing.assert_allclose(rates[7:], 1e-3 * np.linspace(0.5, 0, 6), rtol=1e-6)


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_weights_decay_no_longer_than_was_said(name):
  c = config(name=name, learning_rate=0.1, weight_decay=0.5, weight_decay_until=0.3, clip_norm=0.0)
  c.schedule.name = 'constant_schedule'
  tx, _ = optim.optimizer(c, PARAMS)
  state, found, zeros = tx.init(PARAMS), [], jax.tree.map(jnp.zeros_like, PARAMS)
  for _ in range(5):
    updates, state = jax.jit(tx.update)(zeros, state, PARAMS)
    found.append(float(updates['layers/0/kernel'][0, 0]))
  np.testing.assert_allclose(found, [-0.05] * 3 + [0] * 2, atol=1e-8)
  for changes, words in ((dict(weight_decay_until=30), '30.0: it is a share of all steps'),
                         (dict(name='novograd', weight_decay_until=0.5), "0.5: the decay of 'novograd' is a constant")):
    with pytest.raises(ValueError, match=f'weight_decay_until {words}'):
      optim.optimizer(config(**changes), PARAMS)


def test_constant_and_unknown_schedules():
  c = config(learning_rate=0.3)
  c.schedule.name = 'constant_schedule'
  assert optim.schedule(c)(5) == 0.3
  c.schedule.name = 'cosine_decay'
  with pytest.raises(ValueError, match="Did you mean 'cosine_decay_schedule'"):
    optim.schedule(c)
  c.schedule.name = 'two_stage_linea'
  with pytest.raises(ValueError, match="Did you mean 'two_stage_linear'"):
    optim.schedule(c)
  c.schedule.update(name='constant_schedule', warmup_steps=10)
  with pytest.raises(ValueError, match='leaves nothing of total_steps 10'):
    optim.schedule(c)


def test_moments_in_8_bits():
  params = {'a/kernel': jnp.ones((64, 64)), 'a/bias': jnp.ones(64)}
  for c, taken in ((config(state_bits=8), 2 * 64 * 64), (config(), 8 * 64 * 64)):
    tx, _ = optim.optimizer(c, params)
    states = jax.tree.leaves(jax.jit(tx.init)(params))
    assert sum(x.nbytes for x in states if x.size == 64 * 64) == taken
  with pytest.raises(ValueError, match='state_bits 4'):
    optim.optimizer(config(state_bits=4), params)
