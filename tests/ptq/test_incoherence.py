import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import hessian, incoherence, ldlq, scales

MAKERS = dict(hadamard=incoherence.signed_hadamard, orthogonal=incoherence.random_orthogonal)


def spiky(i=64, o=48, outliers=20):
  """Weights of which a few are large, and the Hessian of correlated inputs."""
  keys = jax.random.split(jax.random.key(0), 3)
  w = jax.random.normal(keys[0], (i, o)).reshape(-1).at[jax.random.permutation(keys[1], i * o)[:outliers]].mul(12.0)
  x = jax.random.normal(keys[2], (4 * i, i))
  return w.reshape(i, o), x.T @ x / len(x)


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_the_product_stays_what_it_is(make):
  w, H = spiky()
  U, V = make(jax.random.key(1), 64), make(jax.random.key(2), 48)
  v, G = incoherence.rotate(w, H, U, V)
  np.testing.assert_allclose(incoherence.rotate_back(v, U, V), w, atol=1e-5 * np.abs(w).max())
  x = jax.random.normal(jax.random.key(3), (5, 64))
  np.testing.assert_allclose((x @ U) @ v @ V.T, x @ w, atol=1e-4 * float(jnp.abs(x @ w).max()))
  np.testing.assert_allclose(hessian.objective(v, G).sum(), hessian.objective(w, H).sum(), rtol=1e-4)


def test_incoherence_of_extremes():
  assert incoherence.incoherence(jnp.ones((8, 6))) == 1
  assert incoherence.incoherence(jnp.zeros((8, 8)).at[2, 3].set(5.0)) == pytest.approx(8)


def test_hadamards_keep_their_bound():
  """Lemma 3.1 of QuIP#, at a chance of 1 % to fail: mu <= 2 log(4 m n / 0.01); far below it in fact."""
  w, H = spiky()
  bound = math.sqrt(2 * math.log(w.size / 0.01))
  for seed in range(10):
    keys = jax.random.split(jax.random.key(seed), 2)
    v, _ = incoherence.rotate(w, H, *(incoherence.signed_hadamard(k, n) for k, n in zip(keys, w.shape)))
    assert incoherence.incoherence(v) < bound < incoherence.incoherence(w)


def test_two_bits_lose_less_where_weights_have_outliers_and_nothing_where_they_have_none():
  """Under one scale for the matrix, as the paper has it."""
  spec = specs.integer(2, specs.TENSOR)

  @jax.jit
  def solve(w, H):
    q = ldlq.ldlq(w, hessian.factor(H), spec, *scales.fit(scales.HessianSearch(), w, spec, H))
    return hessian.objective(qarray.decode(q) - w, H).sum()

  U, V = (incoherence.signed_hadamard(jax.random.key(k), n) for k, n in ((1, 64), (2, 48)))
  gain = lambda w, H: solve(w, H) / solve(*incoherence.rotate(w, H, U, V))
  w, H = spiky()
  assert gain(w, H) > 1.5
  assert 0.9 < gain(jax.random.normal(jax.random.key(5), w.shape), H) < 1.1
