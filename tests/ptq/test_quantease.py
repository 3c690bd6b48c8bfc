import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import qarray, specs
from qat.ptq import hessian, quantease


def problem(i, o, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((4 * i, i)) @ rng.standard_normal((i, i))
  return np.float32(rng.standard_normal((i, o))), np.float32(x.T @ x / len(x))


def test_a_sweep_is_coordinate_descent():
  """Over 150 rows, which are more than one block; in float64, a row at a time."""
  w, H = problem(150, 5)
  q = qarray.encode(w, specs.integer(3, (None, 1)))
  s, w_hat = np.asarray(q.scale, np.float64)[0], np.asarray(qarray.decode(q), np.float64)
  for k in range(150):
    bottom = w_hat[k] - H[k].astype(np.float64) @ (w_hat - w) / H[k, k]
    w_hat[k] = np.clip(np.rint(bottom / s), -4, 3) * s
  np.testing.assert_allclose(qarray.decode(quantease.descend(w, H, q, 1)), w_hat, rtol=1e-5)


def test_ends_where_no_other_code_of_one_number_is_better():
  w, H = problem(5, 3)
  spec = specs.integer(2, (None, 1))
  q = jax.jit(lambda w, H: quantease.descend(w, H, qarray.encode(w, spec), 20))(w, H)
  error = lambda w_hat: np.einsum('io,ij,jo->', w_hat - w, H, w_hat - w)
  w_hat = np.asarray(qarray.decode(q))
  for i, o, level in itertools.product(range(5), range(3), (-2, -1, 0, 1)):
    other = w_hat.copy()
    other[i, o] = level * q.scale[0, o]
    assert error(other) >= error(w_hat) - 1e-4


def test_more_sweeps_are_never_worse_and_dead_inputs_stay():
  w, H = problem(48, 6)
  H[7], H[:, 7] = 0, 0
  q = qarray.encode(w, specs.integer(3, (48, 1)))
  error = lambda q: float(hessian.objective(qarray.decode(q) - w, jnp.float32(H)).sum())
  errors = [error(q)] + [error(quantease.descend(w, H, q, n)) for n in (1, 3)]
  assert errors[0] > errors[1] > errors[2]
  np.testing.assert_array_equal(quantease.descend(w, H, q, 3).codes[7], q.codes[7])
