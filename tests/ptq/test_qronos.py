import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import gptq, hessian, qronos


def problem(i=20, o=4, n=200, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((n, i)) @ rng.standard_normal((i, i))
  xq = x + 0.5 * rng.standard_normal((n, i)) @ rng.standard_normal((i, i))
  return rng.standard_normal((i, o)), x, xq


def by_hand(w, X, Xq, scale, low, high):
  """The paper's two steps: round a row at its best, then the rows below at theirs, by least squares over X~ itself."""
  v, q, target = w.copy(), np.zeros_like(w), X @ w
  for t in range(len(w)):
    rest = target - Xq[:, :t] @ q[:t] - Xq[:, t + 1:] @ v[t + 1:]
    q[t] = np.clip(np.rint(Xq[:, t] @ rest / (Xq[:, t] @ Xq[:, t]) / scale), low, high) * scale
    v[t + 1:] = np.linalg.lstsq(Xq[:, t + 1:], target - Xq[:, :t + 1] @ q[:t + 1], rcond=None)[0]
  return q


@pytest.mark.parametrize('seed', range(3))
def test_codes_are_those_of_the_papers_two_steps(seed):
  w, x, xq = problem(seed=seed)
  spec = specs.integer(4, (None, 1))
  scale = np.abs(w).max(0) / 7
  want = by_hand(w, x, xq, scale, -8, 7)
  factor = hessian.factor(jnp.float32(xq.T @ xq / 200), 1e-6)
  q = qronos.qronos(jnp.float32(w), factor, jnp.float32(xq.T @ x / 200), spec)
  near = qarray.decode(qarray.encode(jnp.float32(w), spec))
  error = lambda w_hat: ((x @ w - xq @ np.asarray(w_hat)) ** 2).sum(0)
  kept = error(want) < error(near)                                         # The others are rounded to nearest.
  assert kept.any()
  np.testing.assert_allclose(qarray.decode(q), np.where(kept, want, near), atol=1e-4)


def test_equal_inputs_give_gptqs_codes():
  w, x, _ = problem(i=64, n=400)
  H, spec = jnp.float32(x.T @ x / 400), specs.integer(3, (32, 1))
  factor = hessian.factor(H, 0.01, True)
  w = jnp.float32(w)
  np.testing.assert_array_equal(qronos.qronos(w, factor, H, spec).codes, gptq.walk(w, factor, spec).codes)


def test_makes_up_for_errors_of_the_inputs():
  w, x, xq = problem(i=64, n=400)
  spec = specs.integer(4, (64, 1))
  factor = hessian.factor(jnp.float32(xq.T @ xq / 400), 0.01, True)
  solved = qronos.qronos(jnp.float32(w), factor, jnp.float32(xq.T @ x / 400), spec)
  error = lambda q: np.linalg.norm(x @ w - xq @ np.asarray(qarray.decode(q)))
  assert error(solved) < 0.9 * error(gptq.walk(jnp.float32(w), factor, spec))
