import jax
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.core.qarray import Spec, Zero
from qat.ptq import hqq

FLOAT_ZERO = Spec(formats.UINT2, (32, 1), zero=Zero())


def weights(shape=(64, 12)):
  return np.float32(np.random.default_rng(0).standard_t(4, shape) * 0.05)


def by_hand(w, scale, zero, levels, p=0.7, beta=10.0, kappa=1.01, iterations=20):
  """The authors' iteration in float64 for one block, keeping the best zero of all."""
  w, best, least = w.astype(np.float64), zero, np.inf
  for _ in range(iterations + 1):
    value = np.clip(np.rint(w / scale + zero), 0, levels - 1)
    w_r = (value - zero) * scale
    if (loss := (np.abs(w - w_r) ** p).sum()) < least:
      best, least = zero, loss
    x = w - w_r
    with np.errstate(divide='ignore'):
      w_e = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (p - 1) / beta, 0)
    zero, beta = (value - (w - w_e) / scale).mean(), beta * kappa
  return best, least


def test_zeros_are_the_authors():
  w = weights()
  start, q = qarray.encode(w, FLOAT_ZERO), hqq.hqq(w, FLOAT_ZERO)
  np.testing.assert_array_equal(q.scale, start.scale)
  loss = (np.abs(w - qarray.decode(q)) ** 0.7).reshape(2, 32, 12).sum(1)
  for g in range(2):
    for o in range(12):
      _, least = by_hand(w[32 * g:32 * g + 32, o], float(start.scale[g, o]), float(start.zero[g, o]), 4)
      assert loss[g, o] == pytest.approx(least, rel=1e-3)


def test_shrinkage_solves_its_own_problem():
  """Near enough: within a percent of the minimum where the error is not small."""
  errors, e = np.float32([0.5, 1.0, 2.0, -1.5]), np.linspace(-3, 3, 60001)
  cost = lambda e, x: np.abs(e) ** 0.7 + 5.0 * (e - x) ** 2
  for x, got in zip(errors, hqq.shrink(errors, 0.7, 10.0)):
    assert cost(float(got), x) <= 1.01 * cost(e, x).min()


GRIDS = dict(int2=specs.integer(2, (32, 1)), affine=specs.affine(2, (32, 1)), q2_k=specs.kernel(specs.Q2_K),
             mxfp4=specs.kernel(specs.MXFP4), nf4_dq=specs.kernel(specs.NF4_DQ))


@pytest.fixture(scope='module')
def solved():
  w = weights((256, 12))
  both = jax.jit(lambda w: {n: (qarray.encode(w, s), hqq.hqq(w, s)) for n, s in GRIDS.items()})
  return w, both(w)


@pytest.mark.parametrize('name', GRIDS)
def test_any_grid_is_solved_and_never_worse(solved, name):
  w, (near, q) = solved[0], solved[1][name]
  assert jax.tree.structure(near) == jax.tree.structure(q)
  loss = lambda q: (np.abs(w - qarray.decode(q)) ** 0.7).sum()
  assert loss(q) <= loss(near) * (1 + 1e-6)
  if name == 'int2':
    assert loss(q) < 0.9 * loss(near)
