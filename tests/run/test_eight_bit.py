"""8-bit optimizer states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qat.core import codebooks, qarray
from qat.run import eight_bit


def least_squares(tx, steps):
  """The losses of a linear map of 64 inputs to 64 outputs, learned by `tx` from 16 of 1,024 noisy examples a step."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((1024, 64)), jnp.float32)
  y = x @ jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
  y += jnp.asarray(rng.standard_normal((1024, 64)), jnp.float32)
  loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)

  @jax.jit
  def step(carry, rows):
    w, state = carry
    updates, state = tx.update(jax.grad(loss)(w, x[rows], y[rows]), state, w)
    w = optax.apply_updates(w, updates)
    return (w, state), loss(w, x, y)

  w = jnp.zeros((64, 64))
  (w, state), losses = jax.lax.scan(step, (w, tx.init(w)), jnp.asarray(rng.integers(1024, size=(steps, 16))))
  return np.asarray(losses), state


def test_a_step_of_adam_is_that_of_its_decoded_moments():
  """Against Algorithm 1 of Adam and the block-wise map, written out in numpy."""
  rng = np.random.default_rng(1)
  gradients = rng.standard_normal((2, 4096)).astype(np.float32)
  tx = eight_bit.eight_bit(optax.adam(0.1, b1=0.9, b2=0.99))
  state = tx.init(jnp.zeros(4096))
  m, v = np.zeros(4096, np.float32), np.zeros(4096, np.float32)
  for t, g in enumerate(gradients, 1):
    updates, state = jax.jit(tx.update)(jnp.asarray(g), state)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    want = -0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    np.testing.assert_allclose(updates, want, rtol=1e-4, atol=1e-6)
    m, v = on_the_map(m, codebooks.DYNAMIC8), on_the_map(v, codebooks.DYNAMIC8_UNSIGNED)
  np.testing.assert_allclose(qarray.decode(state[0].mu), m, rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(qarray.decode(state[0].nu), v, rtol=1e-5, atol=1e-9)


def on_the_map(x, book):
  """Each block of 256 to the nearest level under its absmax."""
  blocks, levels = x.reshape(-1, 256), np.asarray(book.levels(), np.float32)
  absmax = np.abs(blocks).max(1, keepdims=True)
  nearest = np.abs((blocks / absmax)[..., None] - levels).argmin(-1)
  return (levels[nearest] * absmax).reshape(x.shape)


@pytest.mark.parametrize('make', [optax.adam, lambda rate: optax.lion(rate / 3)], ids=['adam', 'lion'])
def test_losses_are_those_of_32_bits(make):
  full, _ = least_squares(make(0.03), 300)
  low, state = least_squares(eight_bit.eight_bit(make(0.03)), 300)
  assert isinstance(state[0].mu, qarray.QArray)
  assert full[-1] < 0.1 * full[0]
  np.testing.assert_allclose(low, full, rtol=0.2)


def test_a_linear_map_is_worse_than_the_dynamic_one():
  """Most second moments of a block are tiny beside its largest: a linear map makes zeros of them."""
  linear = codebooks.Codebook(tuple(np.linspace(0, 1, 256).astype(np.float32).tolist()), 'LINEAR8')
  rng = np.random.default_rng(2)
  nu = jnp.asarray(rng.standard_normal(4096).astype(np.float32) ** 2 * 10.0 ** rng.uniform(-5, 0, 4096))
  zeros = lambda book: float(jnp.mean(qarray.decode(qarray.encode(nu, qarray.Spec(book, eight_bit.Flat(256)))) == 0))
  assert zeros(linear) > 0.3
  assert zeros(codebooks.DYNAMIC8_UNSIGNED) < 0.05


def test_states_take_a_quarter():
  params = dict(w=jnp.zeros((256, 256)), b=jnp.zeros(256))
  size = lambda tx: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))
  full, low = size(optax.adamw(1e-3)), size(eight_bit.eight_bit(optax.adamw(1e-3)))
  assert 1 - low / full >= 0.7
  state = eight_bit.eight_bit(optax.adamw(1e-3)).init(params)
  assert state[0].mu['b'].dtype == jnp.float32  # Fewer than 4,096 numbers.
  assert state[0].mu['w'].codes.dtype == state[0].nu['w'].codes.dtype == jnp.uint8
