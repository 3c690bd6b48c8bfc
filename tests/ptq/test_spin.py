"""Cayley steps stay orthogonal and go down; learned rotations beat random ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import hadamard, qarray, specs
from qat.ptq import links, rotate, spin
from tests.ptq import tiny


TOKEN, CHANNEL = (spin.Ranged(specs.integer(4, block)) for block in (specs.TOKEN, specs.CHANNEL))


def test_a_step_is_the_cayley_transform():
  draw = np.random.default_rng(0)
  R = np.linalg.qr(draw.normal(size=(6, 6)))[0]
  G = draw.normal(size=(6, 6)) * 0.01
  A = G @ R.T - 0.5 * R @ R.T @ G @ R.T
  W = A - A.T
  expected = np.linalg.inv(np.eye(6) + 0.25 * W) @ (np.eye(6) - 0.25 * W) @ R  # alpha = 0.5: W is small.
  np.testing.assert_allclose(spin.cayley_step(jnp.float32(R), jnp.float32(G), 0.5), expected, atol=1e-6)


def test_hundred_steps_stay_orthogonal_and_reach_the_nearest_rotation():
  """max tr(R^T M) is the orthogonal Procrustes problem, whose solution is U V^T."""
  draw = np.random.default_rng(1)
  R0 = np.linalg.qr(draw.normal(size=(24, 24)))[0]
  skew = draw.normal(size=(24, 24)) * 0.05
  target = np.linalg.solve(np.eye(24) + (skew - skew.T), np.eye(24) - (skew - skew.T)) @ R0  # Of the same determinant.

  @jax.jit
  def run(R, M):
    step = lambda R, _: (spin.cayley_step(R, -M, 0.3), None)
    return jax.lax.scan(step, R, None, length=100)[0]

  R = np.asarray(run(jnp.float32(R0), jnp.float32(target)), np.float64)
  assert np.abs(R.T @ R - np.eye(24)).max() < 1e-5
  np.testing.assert_allclose(R, target, atol=1e-3)


def test_large_gradients_are_capped():
  R = hadamard.orthonormal(8)
  G = 1e6 * jax.random.normal(jax.random.key(0), (8, 8))
  after = np.asarray(spin.cayley_step(R, G, 1.5), np.float64)
  assert np.abs(after.T @ after - np.eye(8)).max() < 1e-5
  np.testing.assert_allclose(spin.cayley_step(R, jnp.zeros((8, 8)), 1.5), R, atol=1e-6)


@functools.cache
def data():
  """Inputs with a direction of outliers, and a weight that reads them."""
  draw = np.random.default_rng(0)
  x = draw.normal(size=(128, 16)) + np.outer(draw.normal(size=128), 6 * (np.arange(16) % 7 == 1))
  return x.astype(np.float32), draw.normal(size=(16, 8)).astype(np.float32)


def layer_loss(R, model, data):
  """The output error of a layer whose rotated inputs and weights have 4 bits."""
  del model
  x, w = data
  dot = functools.partial(jnp.matmul, precision='highest')
  x_hat, w_hat = TOKEN(dot(x, R)), CHANNEL(dot(R.T, w))
  return jnp.mean((dot(x_hat, w_hat) - dot(x, w)) ** 2)


def test_learned_is_better_than_random():
  start = [hadamard.randomized(jax.random.key(i), 16) for i in range(8)]
  value = jax.jit(lambda R: layer_loss(R, None, data()))
  random = [float(value(R)) for R in start]
  best, losses = spin.learn(layer_loss, start[0], tiny.llama(), [data()] * 100)
  assert float(value(best)) <= min(losses) * 1.01
  assert np.std(random) > 0 and float(value(best)) < 0.7 * np.mean(random) and float(value(best)) < min(random)
  np.testing.assert_allclose(best @ best.T, np.eye(16), atol=1e-5)


def test_of_a_quantized_model():
  """R1 and R2 of a decoder, whose rotated weights and inputs are rounded inside of the loss."""
  model = tiny.llama(tied_head=False)
  model, stream = rotate.fold_norms(model, rotate.resolve(model, rotate.DECODER, tiny.TOKENS))
  values = links.resolve(model, links.heads(8), tiny.TOKENS)
  recipe = [qat.Rule('blocks/.*', CHANNEL, TOKEN, kind='Linear'), qat.Rule('.*')]

  def turned(rotations, model):
    return rotate.rotate_heads(rotate.rotate_stream(model, stream, rotations['r1']), values, rotations['r2'])

  def loss(rotations, model, tokens):
    scores = jax.nn.log_softmax(qat.quantize(turned(rotations, model), recipe)(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], -1))

  start = dict(r1=hadamard.randomized(jax.random.key(0), 24), r2=hadamard.orthonormal(8))
  best, losses = spin.learn(loss, start, model, [tiny.TOKENS] * 10)
  assert min(losses) < losses[0]
  assert all((best[k] != start[k]).any() for k in start)
  assert links.distance(model, turned(best, model), tiny.TOKENS) < 1e-5


def test_errors():
  with pytest.raises(ValueError, match='no batch'):
    spin.learn(layer_loss, jnp.eye(4), tiny.llama(), [])
  with pytest.raises(ValueError, match='step 0 is nan'):
    spin.learn(layer_loss, jnp.eye(16), tiny.llama(), [(jnp.full((4, 16), jnp.nan), data()[1])])


def test_ranges_hand_gradients_on():
  """The largest number of a row is on its grid always; the others move as their codes times the range."""
  x = jnp.array([[7.0, 1.4, -2.8]])
  slope = jax.grad(lambda x: jnp.sum(TOKEN(x) * jnp.array([[0.0, 1.0, 1.0]])))(x)
  # d x_hat_1 = dx_1 + (1 - 1.4) ds, d x_hat_2 = dx_2 + (-3 + 2.8) ds, and ds = dx_0 / 7.
  np.testing.assert_allclose(slope, [[-0.6 / 7, 1.0, 1.0]], rtol=1e-5)
  with pytest.raises(ValueError, match='no zero'):
    spin.Ranged(specs.affine(4, (32, 1)))


MEMBERS = [TOKEN, CHANNEL, spin.Ranged(specs.kernel(specs.Q8_0))]


@pytest.mark.parametrize('quantizer', MEMBERS, ids=lambda q: str(q.spec))
def test_ranged_trains_as_it_serves(quantizer):
  x = jax.random.normal(jax.random.key(0), (64, 32))
  run = jax.jit(lambda x: (quantizer(x), qarray.decode(quantizer.encode(x)), *quantizer.both(x)))
  value, served, again, codes = run(x)
  np.testing.assert_array_equal(value, served)
  np.testing.assert_array_equal(again, qarray.decode(codes))
