"""DoReFa-Net against Zhou et al. 2016 (https://arxiv.org/abs/1606.06160), Eqs. 5-12."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray
from qat.quantizers import dorefa

W = jax.random.normal(jax.random.key(0), (6, 5))


def quantize_k(r, bits):
  """Eq. (5)."""
  return np.round((2**bits - 1) * r) / (2**bits - 1)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_weights_are_eq_9(bits):
  t = np.tanh(np.asarray(W, np.float64))
  want = 2 * quantize_k(t / (2 * np.abs(t).max()) + 0.5, bits) - 1
  got = dorefa.DoReFaWeight(bits).for_weight(W)(W)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert len(np.unique(got)) <= 2**bits


def test_one_bit_weights_are_eq_8():
  got = dorefa.DoReFaWeight(1).for_weight(W)(W)
  np.testing.assert_allclose(got, np.sign(W) * np.abs(W).mean(), rtol=1e-6)


def test_the_gradient_of_one_bit_weights_passes_straight_through():
  c = jax.random.normal(jax.random.key(1), W.shape)
  np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(c * dorefa.DoReFaWeight(1)(w)))(W), c)


def test_the_gradient_of_weights_follows_tanh_and_its_maximum():
  """Eq. (9) without its rounding is tanh(w) / max|tanh(w)|: finite differences in 64 bits."""
  c = np.asarray(jax.random.normal(jax.random.key(1), W.shape), np.float64)
  smooth = lambda w: np.sum(c * np.tanh(w) / np.abs(np.tanh(w)).max())
  w, step = np.asarray(W, np.float64), 1e-6
  slope = np.zeros_like(w)
  for i in np.ndindex(*w.shape):
    e = np.zeros_like(w)
    e[i] = step
    slope[i] = (smooth(w + e) - smooth(w - e)) / (2 * step)
  got = jax.grad(lambda w: jnp.sum(jnp.asarray(c, jnp.float32) * dorefa.DoReFaWeight(2)(w)))(W)
  np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


def test_inputs_are_clipped_to_one_and_their_gradient_too():
  x = jnp.array([[-0.5, 0.0, 0.2, 0.5, 0.9, 1.0, 1.5]])
  q = dorefa.DoReFaInput(2)
  np.testing.assert_allclose(q(x)[0], [0, 0, 1 / 3, 2 / 3, 1, 1, 1], rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(lambda x: q(x).sum())(x)[0], [0, 1, 1, 1, 1, 1, 0])


@functools.partial(jax.jit, static_argnums=2)
def backward(g, key, bits):
  """What comes back where g goes in."""
  return jax.vjp(lambda x: dorefa.quantize_gradient(x, key, bits), jnp.zeros_like(g))[1](g)[0]


def test_gradients_lie_on_the_grid_of_eq_12():
  g = jax.random.normal(jax.random.key(2), (3, 50)) * jnp.array([[1.0], [10.0], [0.0]])
  got = np.asarray(backward(g, jax.random.key(3), 3))
  m = np.abs(g).max(1, keepdims=True)
  codes = (got[:2] / (2 * m[:2]) + 0.5) * 7
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
  assert codes.min() >= -1e-5 and codes.max() <= 7 + 1e-5
  np.testing.assert_array_equal(got[2], 0)


def test_gradients_are_unbiased():
  g = jax.random.normal(jax.random.key(2), (1, 64))
  draws = np.asarray(jax.vmap(lambda key: backward(g, key, 2))(jax.random.split(jax.random.key(4), 4000)), np.float64)
  step = 2 * np.abs(g).max() / 3
  p = np.asarray(g) / step + 1.5 - np.floor(np.asarray(g) / step + 1.5)
  sigma = step * np.sqrt(p * (1 - p) / len(draws)) + 1e-5                      # Of a Bernoulli draw's mean.
  assert (np.abs(draws.mean(0) - np.asarray(g)) / sigma).max() < 5


def test_the_layers_gradient_quantizer_draws_anew_after_each_call():
  q = dorefa.DoReFaGradient(2).for_input(())
  g = jax.random.normal(jax.random.key(2), (1, 64))
  back = lambda: jax.vjp(q, jnp.zeros_like(g))[1](g)[0]
  first, again = back(), back()
  q.advance()
  np.testing.assert_array_equal(first, again)
  assert (np.asarray(first) != np.asarray(back())).any()


def test_codes_decode_to_eq_9():
  q = dorefa.DoReFaWeight(2).for_weight(W)
  assert set(np.unique(q.encode(W).codes.astype(np.int32))) <= {0, 1, 2, 3}
  np.testing.assert_array_equal(qarray.decode(q.encode(W)), q(W))
