"""Hadamard matrices are exact, and the fast transform is the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qat.core import hadamard

transform = jax.jit(hadamard.transform)


@pytest.mark.parametrize('n', [1, 2, *range(4, 92, 4), 100, 148, 172, 344, 384, 400, 576, 768])
def test_rows_are_orthogonal(n):
  H = hadamard.matrix(n).astype(np.int64)
  assert set(np.unique(H)) <= {-1, 1}
  np.testing.assert_array_equal(H @ H.T, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize('n', [1, 2, 4, 8, 64, 512])
def test_powers_of_two_are_sylvesters(n):
  np.testing.assert_array_equal(hadamard.matrix(n), scipy.linalg.hadamard(n))


@pytest.mark.parametrize('q', [3, 7, 11, 19, 23, 27, 31, 43, 83])
def test_paley1(q):
  H = hadamard.paley1(q).astype(int)
  np.testing.assert_array_equal(H @ H.T, (q + 1) * np.eye(q + 1, dtype=int))
  np.testing.assert_array_equal(H + H.T, 2 * np.eye(q + 1, dtype=int))   # A skew Hadamard matrix.


@pytest.mark.parametrize('q', [5, 9, 13, 17, 25, 29, 37, 49])
def test_paley2(q):
  H = hadamard.paley2(q).astype(int)
  np.testing.assert_array_equal(H @ H.T, 2 * (q + 1) * np.eye(2 * (q + 1), dtype=int))
  np.testing.assert_array_equal(H, H.T)


@pytest.mark.parametrize('p', [3, 7, 13, 19, 43])
def test_williamson(p):
  H = hadamard.williamson(p).astype(int)
  np.testing.assert_array_equal(H @ H.T, 4 * p * np.eye(4 * p, dtype=int))


@pytest.mark.parametrize(('n', 'core'), [
    (576, 36), (1536, 12), (384, 12), (3072, 12), (768, 12), (14336, 28), (11008, 172), (5120, 20), (18944, 148),
    (8960, 140), (4864, 76), (13824, 108), (4096, 1)])
def test_widths_of_networks(n, core):
  assert hadamard.core_order(n) == core


@pytest.mark.parametrize('n', [1, 8, 12, 48, 172, 576])
def test_the_fast_transform_is_the_matrix(n):
  x = np.random.default_rng(n).normal(size=(3, 2, n)).astype(np.float32)
  signs = np.sign(np.random.default_rng(n + 1).normal(size=n)).astype(np.float32)
  H = hadamard.matrix(n).astype(np.float64) / np.sqrt(n)
  np.testing.assert_allclose(transform(x), x.astype(np.float64) @ H, atol=2e-6)
  np.testing.assert_allclose(transform(x, signs), (x * signs).astype(np.float64) @ H, atol=2e-6)
  np.testing.assert_allclose(x @ np.asarray(hadamard.orthonormal(n, signs)), transform(x, signs), atol=3e-6)


def test_randomized_is_orthonormal_and_random():
  R, S = (np.asarray(hadamard.randomized(jax.random.key(k), 24), np.float64) for k in (0, 1))
  np.testing.assert_allclose(R @ R.T, np.eye(24), atol=1e-6)
  assert (R != S).any()


def test_outliers_are_spread():
  x = jnp.zeros((1, 144)).at[0, 5].set(12.0)
  np.testing.assert_allclose(np.abs(transform(x)), 1.0, atol=1e-6)


def test_transformations_and_dtypes():
  x = jax.random.normal(jax.random.key(0), (4, 12))
  np.testing.assert_array_equal(jax.vmap(hadamard.transform)(x), hadamard.transform(x))
  loss = lambda x: jnp.sum(jnp.sin(hadamard.transform(x)))
  H = hadamard.orthonormal(12)
  np.testing.assert_allclose(jax.grad(loss)(x), jnp.cos(x @ H) @ H.T, atol=1e-6)
  y = hadamard.transform(x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), x @ H, atol=0.05)
  assert hadamard.transform(jnp.zeros((0, 12))).shape == (0, 12)


@pytest.mark.parametrize(('n', 'nearest'), [(6, '(4, 8)'), (7, '(4, 8)'), (92, '(88, 96)'), (0, '(1, 2)')])
def test_an_order_that_is_not_known(n, nearest):
  assert not hadamard.is_constructible(n)
  with pytest.raises(ValueError, match='No Hadamard matrix of order') as error:
    hadamard.matrix(n)
  assert nearest in str(error.value)


def test_matrices_are_not_shared_to_be_written():
  with pytest.raises(ValueError, match='read-only'):
    hadamard.matrix(8)[0, 0] = 3
