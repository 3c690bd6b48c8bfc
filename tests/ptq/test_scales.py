import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, ranges, specs
from qat.core.qarray import Spec, Zero
from qat.ptq import hessian, scales

INT3 = specs.integer(3, (32, 1))


def problem(i=64, o=6, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((4 * i, i)) @ (rng.standard_normal((i, i)) * rng.lognormal(0, 1, i))
  return np.float32(rng.standard_normal((i, o))), np.float32(x.T @ x / len(x))


def weighted(w, h, scale):
  """sum h (w - w_hat)^2 of each block of 32 rows, in float64."""
  s = np.repeat(np.asarray(scale, np.float64), 32, axis=0)
  wrong = w - np.clip(np.rint(w / s), -4, 3) * s
  return (h[:, None] * wrong**2).reshape(2, 32, -1).sum(1)


def test_search_is_the_best_of_its_ratios_and_signs():
  w, H = problem()
  h, amax = np.diag(H), np.abs(w).reshape(2, 32, -1).max(1)
  got = weighted(w, h, scales.fit(scales.HessianSearch(steps=41), w, INT3, H)[0])
  tried = np.linspace(1, 0.2, 41)[:, None] * np.array([1, -1])
  best = np.min([weighted(w, h, r * amax / 3) for r in tried.ravel()], axis=0)
  np.testing.assert_allclose(got, best, rtol=1e-4)
  one_sided = weighted(w, h, scales.fit(scales.HessianSearch(steps=41, signs=(1.0,)), w, INT3, H)[0])
  assert got.sum() < 0.95 * one_sided.sum()
  plain = weighted(w, h, scales.fit(ranges.Search(steps=41), w, INT3, H)[0])
  assert one_sided.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize('spec', [specs.kernel(specs.MXFP4), specs.integer(3, (32, 1), narrow=True),
                                  specs.affine(3, (32, 1))], ids=['mxfp4', 'narrow', 'affine'])
def test_scales_stay_positive_where_a_sign_says_nothing(spec):
  w, H = problem()
  scale, zero = scales.fit(scales.HessianSearch(), w, spec, H)
  assert (qarray.decode(scale) > 0).all() and (zero is None) == (spec.zero is None)


def test_a_hessian_that_says_nothing_leaves_the_range_whole():
  w, _ = problem()
  for H in (jnp.zeros((64, 64)), jnp.full((64, 64), jnp.nan)):
    np.testing.assert_array_equal(scales.fit(scales.HessianSearch(), w, INT3, H)[0], ranges.absmax(w, INT3)[0])


@pytest.mark.parametrize('zero', [None, Zero()], ids=['scale', 'scale and zero'])
def test_refit_is_least_squares(zero):
  w, H = problem()
  spec = Spec(formats.UINT3, (32, 1), zero=zero) if zero else INT3
  q = qarray.encode(w, spec)
  got = hessian.objective(qarray.decode(scales.refit(w, H, q)) - w, H)
  value = np.asarray(q.codes, np.float64)
  L = np.linalg.cholesky(H.astype(np.float64)).T                           # |L d|^2 = d^T H d
  for k in range(w.shape[1]):
    groups = np.eye(2).repeat(32, axis=0)
    V = np.concatenate([value[:, k:k + 1] * groups, groups], 1) if zero else value[:, k:k + 1] * groups
    wrong = L @ (V @ np.linalg.lstsq(L @ V, L @ w[:, k].astype(np.float64), rcond=None)[0] - w[:, k])
    assert got[k] == pytest.approx(float(wrong @ wrong), rel=1e-3)


GRIDS = dict(tensor=specs.integer(3, (...,)), tiles=specs.integer(3, (32, 2)), nf4=specs.kernel(specs.NF4),
             nf4_dq=specs.kernel(specs.NF4_DQ), nvfp4=specs.kernel(specs.NVFP4), q4_k=specs.kernel(specs.Q4_K),
             q3_k=specs.kernel(specs.Q3_K), affine=specs.affine(3, (32, 1)))


@pytest.fixture(scope='module')
def refitted():
  w, H = problem(256, 6)

  @jax.jit
  def all_of(w, H):
    q = {n: qarray.encode(w, s) for n, s in GRIDS.items()}
    return q, {n: scales.refit(w, H, q[n]) for n in GRIDS}

  return w, H, *all_of(w, H)


@pytest.mark.parametrize('name', GRIDS)
def test_refit_keeps_codes_and_grids_and_is_never_worse(refitted, name):
  w, H, before, after = refitted
  assert jax.tree.structure(before[name]) == jax.tree.structure(after[name])
  np.testing.assert_array_equal(before[name].codes, after[name].codes)
  error = lambda q: hessian.objective(qarray.decode(q) - w, H).sum()
  assert error(after[name]) < error(before[name])


def test_runs_across_columns_are_left_as_they_are():
  w, H = problem(64, 6)
  q = qarray.encode(w, specs.NF4)                                          # row after row: 64 / 6 is no whole number.
  np.testing.assert_array_equal(scales.refit(w, H, q).scale, q.scale)
