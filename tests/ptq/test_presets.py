"""The settings of published methods: their rates over the steps, and that they are values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qat.ptq import presets, reconstruct


def changes(group, steps, gradient=1.0):
  """What the group's optimizer adds to a number at each of its steps, under one gradient."""
  tx = group.transformation(steps)

  def step(carry, _):
    p, state = carry
    update, state = tx.update(jnp.float32(gradient), state, p)
    return (p, state), update

  with jax.numpy_dtype_promotion('standard'):
    start = jnp.float32(0)
    return np.asarray(jax.lax.scan(step, (start, tx.init(start)), None, steps)[1])


def test_signround_moves_by_one_over_the_steps_decaying_linearly_to_0():
  for steps in (200, 50):
    for group in presets.AUTOROUND.groups:
      got = changes(group, steps, -1e-9)
      np.testing.assert_allclose(got, (1 - np.arange(steps) / steps) / steps, rtol=1e-4, atol=1e-9)
      assert 0.5 <= got.sum() < 0.52                                      # V reaches its bound, and no more.


def test_adaround_moves_at_a_constant_rate():
  np.testing.assert_allclose(changes(presets.ADAROUND.groups[0], 5), -np.full(5, 1e-3), rtol=1e-4)


def test_qdrops_steps_and_efficientqats_rates_fall_as_a_cosine():
  progress = np.arange(100) / 100
  cosine = 0.5 * (1 + np.cos(np.pi * progress))
  np.testing.assert_allclose(changes(presets.QDROP.groups[1], 100), -4e-5 * cosine, rtol=1e-3, atol=1e-9)
  for group, rate in zip(presets.EFFICIENTQAT_BLOCK_AP.groups, (1e-4, 1e-5)):
    got = changes(group, 100)
    np.testing.assert_allclose(got, -rate * (0.05 + 0.95 * cosine), rtol=1e-3)


def test_hardening_ends_with_all_and_grows():
  shares = [presets.hardening(p) for p in np.linspace(0, 1, 21)]
  assert shares[0] == 0 and shares[-1] == 1 and (np.diff(shares) > 0).all()


def test_they_are_values():
  found = {name: value for name, value in vars(presets).items() if isinstance(value, reconstruct.Settings)}
  assert len(found) == 9
  for settings in found.values():
    assert hash(settings) == hash(dataclasses.replace(settings)) and settings == dataclasses.replace(settings)
