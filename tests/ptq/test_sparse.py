import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import gptq, hessian, scales, sparse

SPEC = specs.integer(3, (32, 1))


@pytest.fixture(scope='module')
def problem():
  keys = jax.random.split(jax.random.key(0), 4)
  w = jax.random.normal(keys[0], (64, 24))
  w = jnp.where(jax.random.uniform(keys[1], w.shape) < 0.01, 10 * w, w)
  x = jax.random.normal(keys[2], (256, 64)) @ jax.random.normal(keys[3], (64, 64))
  H = x.T @ x / len(x)
  return w, H, hessian.factor(H, 0.01, True)


def error(w, H, w_hat):
  return float(hessian.objective(w_hat - w, H).sum())


def test_outliers_are_the_most_sensitive_numbers(problem):
  w, H, factor = problem
  q = sparse.spqr(w, factor, SPEC, 0.02)
  damped = np.asarray(H, np.float64) + 0.01 * np.diag(H).mean() * np.eye(64)
  inverse = np.diag(np.linalg.inv(damped))
  sensitivity = np.asarray((w - qarray.fake(w, SPEC)) ** 2) / inverse[:, None]
  want = np.sort(np.argsort(-sensitivity.ravel())[:31])                    # 2 % of 1,536
  np.testing.assert_array_equal(q.rows * 24 + q.columns, want)


def test_two_percent_in_floats_beat_all_on_the_grid(problem):
  w, H, factor = problem
  q, dense = sparse.spqr(w, factor, SPEC, 0.02), gptq.walk(w, factor, SPEC)
  assert error(w, H, q.decode()) < 0.7 * error(w, H, qarray.decode(dense))
  assert q.nbits == dense.nbits + 31 * 32 + 32 * 65
  np.testing.assert_array_equal(np.asarray(q.decode())[q.rows, q.columns], q.values.astype(jnp.float32))


def test_none_in_floats_is_gptq(problem):
  w, H, factor = problem
  q = sparse.spqr(w, factor, SPEC, 0.0, scales.HessianSearch())
  want = gptq.walk(w, factor, SPEC, *scales.fit(scales.HessianSearch(), w, SPEC, H))
  assert q.values.size == 0
  np.testing.assert_array_equal(q.dense.codes, want.codes)


def test_never_worse_than_the_rest_rounded_to_nearest(problem):
  w, H, factor = problem
  q = sparse.spqr(w, factor, specs.kernel(specs.NF4), 0.01)
  near = qarray.decode(qarray.encode(w, q.dense.spec, q.dense.scale)).at[q.rows, q.columns].set(w[q.rows, q.columns])
  assert error(w, H, q.decode()) < error(w, H, near)
