"""PACT's gradients against Choi et al. 2018 (https://arxiv.org/abs/1805.06085), Eqs. 1-3."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.quantizers import pact

X = jnp.array([[-1.0, -0.0, 0.1, 0.5, 0.9, 1.5, 2.0, 3.0]])


def quantizer(alpha=1.5, bits=2):
  return pact.PACT(bits, alpha).for_input(())


def test_values_are_those_of_eqs_1_and_2():
  # Clipped to [0, 1.5], on 3 steps of 0.5; 0.9 is nearest to 1.
  np.testing.assert_allclose(quantizer()(X)[0], [0, 0, 0, 0.5, 1, 1.5, 1.5, 1.5], rtol=1e-6)


def test_the_gradient_of_alpha_is_eq_3():
  """1 where x >= alpha, 0 elsewhere: summed, the number of clipped activations."""
  g = nnx.grad(lambda q: jnp.sum(q(X) * jnp.arange(1.0, 9)[None]))(quantizer())
  assert g['alpha'][...] == 6 + 7 + 8


def test_the_gradient_of_alpha_is_a_finite_difference_where_it_clips():
  step, clipped = 1e-3, X >= 1.5
  slope = (quantizer(1.5 + step)(X) - quantizer(1.5 - step)(X)) / (2 * step)
  np.testing.assert_allclose(slope[clipped], 1, rtol=1e-3)
  jacobian = nnx.grad(lambda q: jnp.sum(q(X)[clipped]))(quantizer())
  np.testing.assert_allclose(jacobian['alpha'][...], slope[clipped].sum(), rtol=1e-3)


def test_the_gradient_of_x_passes_within_the_range():
  g = jax.grad(lambda x: quantizer()(x).sum())(X)
  np.testing.assert_array_equal(g[0], [0, 0, 1, 1, 1, 0, 0, 0])


def test_alpha_starts_at_ten_and_stacks():
  assert pact.PACT(4).alpha[...] == 10 and pact.PACT(4).for_input((3,)).alpha[...].tolist() == [10, 10, 10]


def test_a_weight_is_refused():
  with pytest.raises(ValueError, match=r'weight of shape \(4, 2\): it clips at 0.*Use DoReFaWeight or LSQ'):
    pact.PACT(4).for_weight(jnp.zeros((4, 2)))
