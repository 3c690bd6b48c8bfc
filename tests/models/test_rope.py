import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.models import rope

TURNS = dict(halves=rope.halves, interleaved=rope.interleaved)


@pytest.fixture(params=TURNS.values(), ids=TURNS)
def turned(request):
  return rope.Rope(base=100.0, turn=request.param)


# A head of 4 features at base 100 has theta = (1, 100^(-2/4)) = (1, 0.1); at position 3 the angles are 3 and 0.3.
def test_halves_turn_feature_i_with_i_plus_half():
  x = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
  y = rope.Rope(100.0, rope.halves)(x, jnp.array([3]))
  np.testing.assert_allclose(
      y.ravel(), [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)], atol=1e-6)


def test_interleaved_turn_neighbours():
  x = jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 1, 4)
  y = rope.Rope(100.0, rope.interleaved)(x, jnp.array([3]))
  np.testing.assert_allclose(
      y.ravel(), [np.cos(3), np.sin(3), np.cos(0.3), np.sin(0.3)], atol=1e-6)


def test_the_turns_differ_by_a_permutation():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
  order = jnp.array([0, 4, 1, 5, 2, 6, 3, 7])  # halves (i, i + 4) brought side by side
  positions = jnp.arange(5)
  np.testing.assert_allclose(
      rope.Rope(turn=rope.halves)(x, positions)[..., order],
      rope.Rope(turn=rope.interleaved)(x[..., order], positions), atol=1e-6)


def test_products_know_only_the_distance(turned):
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  product = lambda m, n: (turned(q, jnp.array([m])) * turned(k, jnp.array([n]))).sum()
  np.testing.assert_allclose(product(7, 4), product(103, 100), atol=1e-4)
  assert abs(product(7, 4) - product(7, 3)) > 1e-2


def test_position_zero_and_lengths_are_kept(turned):
  x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
  y = turned(x, jnp.arange(6))
  np.testing.assert_array_equal(y[:, 0], x[:, 0])
  np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_bfloat16_counts_positions_beyond_256(turned):
  x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
  y = turned(x, jnp.array([1000, 1001]))
  assert y.dtype == jnp.bfloat16
  assert (y[:, 0] != y[:, 1]).any()


def test_odd_heads_are_an_error():
  with pytest.raises(ValueError, match='Rope on heads of 3 features: .* even head_dim'):
    rope.Rope()(jnp.ones((1, 1, 1, 3)), jnp.arange(1))


def test_divisors_slow_each_pair(turned):
  x = jnp.ones((1, 1, 1, 4))
  one = rope.Rope(turned.base, turned.turn, 5.0)(x, jnp.array([15]))
  np.testing.assert_allclose(one, turned(x, jnp.array([3])), atol=1e-6)  # positions are interpolated
  each = rope.Rope(turned.base, turned.turn, (5.0, 1.0))(x, jnp.array([15]))
  changed = (jnp.abs(each - turned(x, jnp.array([15]))) > 1e-3).ravel()
  assert changed.tolist() == ([True, False] * 2 if turned.turn is rope.halves else [True, True, False, False])


@pytest.mark.parametrize('divisors', [(1.0,), (1.0, 2.0, 3.0), ()])
def test_as_many_divisors_as_pairs(divisors):
  with pytest.raises(ValueError, match=r'Rope.divisors of \d numbers on heads of 4 features: there are 2 pairs'):
    rope.Rope(divisors=divisors)(jnp.ones((1, 1, 1, 4)), jnp.arange(1))


def test_llama3_keeps_short_waves_and_divides_long_ones():
  divisors = rope.llama3_divisors(5e5, 128, 8.0, 1.0, 4.0, 8192)
  waves = 2 * np.pi * 5e5 ** (np.arange(0, 128, 2) / 128)  # tokens a turn
  assert all(d == 1 for d, wave in zip(divisors, waves) if wave < 8192 / 4)
  assert all(d == 8 for d, wave in zip(divisors, waves) if wave > 8192)
  assert sorted(divisors) == list(divisors) and len(set(divisors)) > 4
