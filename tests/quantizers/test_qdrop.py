"""QDrop (Wei et al. 2022, https://arxiv.org/abs/2203.05740): what is dropped, and when."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.quantizers import base, lsq, qdrop

X = jax.random.normal(jax.random.key(0), (100, 64))
SPEC = specs.integer(3, specs.TENSOR)


def quantizer(probability=0.5, lead=()):
  return qdrop.QDrop(lsq.LSQ(SPEC), probability).for_input(lead, jnp.full(lead, 0.5))


def test_hard_it_is_the_quantizer_within():
  q = quantizer()
  np.testing.assert_array_equal(q(X), q.quantizer(X))
  np.testing.assert_array_equal(qarray.decode(q.encode(X)), q(X))
  np.testing.assert_array_equal(qarray.decode(q.both(X)[1]), q.both(X)[0])
  assert type(q.frozen()) is type(q.quantizer.frozen())


@pytest.mark.parametrize('probability', [0.0, 0.2, 0.5, 1.0])
def test_relaxed_it_keeps_a_share_in_floats(probability):
  q = quantizer(probability)
  y, x_hat = q.relaxed()(X), q(X)
  assert ((y == X) | (y == x_hat)).all()
  assert abs(np.mean(y == X) - probability) < 0.03                        # 4 deviations of 6400 draws.


def test_the_gradient_is_1_where_it_dropped_and_the_quantizers_elsewhere():
  relaxed = quantizer().relaxed()
  far = 10 * X                                                            # Much is clipped.
  kept = relaxed(far) == far
  g = jax.grad(lambda x: relaxed(x).sum())(far)
  u = far / 0.5
  np.testing.assert_array_equal(g, kept | ((u >= -4) & (u <= 3)))


def test_each_step_and_each_layer_draws_anew():
  one, other = quantizer().relaxed(), quantizer().relaxed()
  other.reseed(jax.random.key(1))
  first = one(X)
  np.testing.assert_array_equal(first, one(X))
  assert (first != other(X)).any()
  one.advance()
  assert (first != one(X)).any()


def test_relaxed_and_back():
  q = quantizer()
  relaxed = q.relaxed()
  assert relaxed.relaxed() is relaxed and relaxed.settled() is q and not isinstance(relaxed, base.Quantizer)
  assert relaxed.penalty(jnp.float32(0.5)) == 0


def test_stacked_layers_draw_each_their_own():
  relaxed = quantizer(lead=(3,)).relaxed()
  graph, state = nnx.split(relaxed)
  y = jax.vmap(lambda state: nnx.merge(graph, state)(X))(state)
  assert (y[0] != y[1]).any() and (y[1] != y[2]).any()


def test_it_is_calibrated_as_the_quantizer_within():
  unsigned = qarray.Spec(formats.UINT3, specs.TENSOR)
  q = qdrop.QDrop(lsq.LSQ(SPEC, unsigned=unsigned))
  assert q.observer is q.quantizer.observer and q.unsigned is unsigned and q.with_spec(unsigned).spec is unsigned
  with pytest.raises(ValueError, match='Use AdaRound for the weight'):
    q.for_weight(X)
