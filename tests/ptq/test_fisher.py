"""The importance of a block's output against Li et al. 2021 (https://arxiv.org/abs/2102.05426), Eq. 10."""

import jax
import jax.numpy as jnp
import numpy as np

from qat.ptq import fisher

Z = jax.random.normal(jax.random.key(0), (6, 4))
A = jax.random.normal(jax.random.key(1), (4, 3))
LABELS = jnp.array([0, 1, 2, 0, 1, 2])


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_of_a_linear_classifier():
  """dL/dz = (softmax(z A) - onehot) A^T."""
  g = (softmax(np.float64(Z) @ np.float64(A)) - np.eye(3)[LABELS]) @ np.float64(A).T
  got = jax.jit(lambda z: fisher.fisher(lambda z: z @ A, z, fisher.cross_entropy(LABELS)))(Z)
  np.testing.assert_allclose(got, g**2 / (g**2).mean(), rtol=1e-4)


def test_by_divergence_from_the_float_network():
  """dKL/dz = (softmax(z A) - softmax(y)) A^T, which is 0 at the float network's own scores."""
  y = (Z + 0.3) @ A
  g = (softmax(np.float64(Z) @ np.float64(A)) - softmax(np.float64(y))) @ np.float64(A).T
  got = jax.jit(lambda z: fisher.fisher(lambda z: z @ A, z, fisher.divergence(y)))(Z)
  np.testing.assert_allclose(got, g**2 / (g**2).mean(), rtol=1e-2, atol=1e-4)


def test_where_nothing_matters_all_counts_alike():
  np.testing.assert_array_equal(fisher.fisher(lambda z: 0 * z, Z, jnp.sum), np.ones(Z.shape))
