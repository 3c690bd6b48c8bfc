import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq import hessian


def correlated(n=24, rows=96, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, n)) @ rng.standard_normal((n, n))
  return np.float32(x.T @ x / rows)


@pytest.mark.parametrize('act_order', [False, True])
def test_is_a_factor_of_the_damped_hessian_in_its_order(act_order):
  H = correlated()
  factor = hessian.factor(H, 0.02, act_order)
  want = (H + 0.02 * np.diag(H).mean() * np.eye(24))[factor.order][:, factor.order]
  np.testing.assert_allclose(factor.R @ factor.R.T, want, atol=1e-5 * want.max())
  np.testing.assert_array_equal(np.tril(factor.R, -1), 0)
  if act_order:
    assert (np.diff(np.diag(H)[factor.order]) <= 0).all()
  exact = np.linalg.cond(want.astype(np.float64))
  assert 1 < factor.condition <= exact * 1.01
  assert hessian.notes(factor, 0.02) == dict(damp=pytest.approx(0.02), dead=0, condition=float(factor.condition))


def test_damping_grows_until_there_is_a_factor():
  values, vectors = np.linalg.eigh(correlated().astype(np.float64))
  values[0] = -0.05 * values.mean()                                        # 0.01 is too little, and 0.1 is enough.
  factor = hessian.factor(np.float32(vectors * values @ vectors.T), 0.01)
  assert factor.damp == pytest.approx(0.1) and factor.ok
  assert 'damped by 0.1' in hessian.notes(factor, 0.01)['fallback']


@pytest.mark.parametrize('H', [np.full((24, 24), np.nan, np.float32), np.zeros((24, 24), np.float32),
                               np.where(np.eye(24) == 1, np.inf, correlated()).astype(np.float32),
                               -1e9 * np.eye(24, dtype=np.float32)], ids=['nan', 'zero', 'inf', 'negative'])
def test_says_when_nothing_helps(H):
  factor = hessian.factor(H)
  assert not factor.ok
  np.testing.assert_array_equal(factor.R, np.eye(24))
  assert 'rounded to nearest' in hessian.notes(factor, 0.01)['fallback']


def test_dead_inputs_are_found_and_singular_matrices_factorized():
  H = correlated(rows=8)                                                   # rank 8
  H[3], H[:, 3] = 0, 0
  factor = hessian.factor(H)
  assert factor.ok and factor.damp == pytest.approx(0.01)
  np.testing.assert_array_equal(np.flatnonzero(factor.dead), [3])
  assert factor.R[3, 3] > 0.99


def test_objective_is_the_squared_error_of_the_outputs():
  rng = np.random.default_rng(0)
  x, dw = rng.standard_normal((50, 24)), rng.standard_normal((24, 5))
  got = hessian.objective(jnp.float32(dw), jnp.float32(x.T @ x / 50))
  np.testing.assert_allclose(got, ((x @ dw) ** 2).mean(0), rtol=1e-4)


def test_says_that_shapes_do_not_fit():
  with pytest.raises(ValueError, match=r'shape \(8, 24\) and a Hessian of shape \(24, 24\).*transpose'):
    hessian.check(np.zeros((8, 24)), correlated())
