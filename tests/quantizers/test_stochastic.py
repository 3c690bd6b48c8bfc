"""Stochastic rounding: unbiased, on the neighbouring codes (Gupta et al. 2015, https://arxiv.org/abs/1502.02551)."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.core import qarray, specs
from qat.quantizers import ste, stochastic

SPEC = specs.integer(4, specs.CHANNEL)
W = jax.random.normal(jax.random.key(0), (32, 2))


def quantizer():
  return stochastic.StochasticRounding(SPEC).for_weight(W)


def test_the_mean_is_the_number_and_each_draw_a_neighbour():
  graph, state = nnx.split(quantizer())

  @jax.jit
  def draw(state, count):
    q = nnx.merge(graph, state)
    q.stream.count[...] = count
    return q(W)

  draws = np.asarray(jax.vmap(draw, (None, 0))(state, jnp.arange(3000, dtype=jnp.uint32)), np.float64)
  scale = np.asarray(qarray.absmax(W, SPEC)[0])
  assert np.abs(draws - np.asarray(W)).max() < scale.max() * (1 + 1e-5)
  p = np.asarray(W) / scale - np.floor(np.asarray(W) / scale)
  sigma = scale * np.sqrt(p * (1 - p) / len(draws)) + 1e-5                     # Of a Bernoulli draw's mean.
  assert (np.abs(draws.mean(0) - np.asarray(W)) / sigma).max() < 5


def test_draws_change_when_it_advances_and_only_then():
  q = quantizer()
  first = q(W)
  np.testing.assert_array_equal(first, q(W))
  q.advance()
  assert (np.asarray(first) != np.asarray(q(W))).any()


def test_stacked_matrices_draw_apart():
  q = stochastic.StochasticRounding(SPEC).for_weight(jnp.stack([W, W]))
  assert q.stream.count[...].shape == (2,)
  keys = jax.random.key_data(q.stream.key[...])
  assert (keys[0] != keys[1]).any()


def test_the_gradient_passes_straight_through():
  np.testing.assert_array_equal(jax.grad(lambda w: quantizer()(w).sum())(W), jnp.ones_like(W))


def test_serving_rounds_to_nearest():
  np.testing.assert_array_equal(quantizer().frozen()(W), ste.STE(SPEC)(W))
