import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import gptq, hessian, ldlq, rtn


def problem(i, o, seed=0, rows=None):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows or 4 * i, i)) @ rng.standard_normal((i, i))
  return np.float32(rng.standard_normal((i, o))), np.float32(x.T @ x / len(x))


def by_hand(w, H, scale, low, high, damp, order):
  """The paper's Algorithm 1 in float64, a row at a time, with the inverse of H: codes."""
  w, H = w.astype(np.float64)[order], H.astype(np.float64)[order][:, order]
  U = np.linalg.cholesky(np.linalg.inv(H + damp * np.diag(H).mean() * np.eye(len(H)))).T
  codes = np.zeros(w.shape, int)
  for k in range(len(w)):
    codes[k] = np.clip(np.rint(w[k] / scale[order[k]]), low, high)
    error = (w[k] - codes[k] * scale[order[k]]) / U[k, k]
    w[k:] -= np.outer(U[k, k:], error)
  result = np.zeros_like(codes)
  result[order] = codes
  return result


@pytest.mark.parametrize('act_order', [False, True])
def test_codes_are_those_of_the_paper(act_order):
  """150 rows are more than one lazy block, and no whole number of them."""
  w, H = problem(150, 12)
  spec = specs.integer(3, (50, 1))
  near = qarray.encode(w, spec)
  order = np.argsort(-np.diag(H), kind='stable') if act_order else np.arange(150)
  want = by_hand(w, H, np.repeat(np.asarray(near.scale, np.float64), 50, axis=0), -4, 3, 0.01, order)
  q = gptq.gptq(w, H, spec, act_order=act_order)
  np.testing.assert_array_equal(q.codes.astype(int), want)
  np.testing.assert_array_equal(q.scale, near.scale)


@pytest.mark.parametrize('spec', [specs.integer(4, (64, 1)), specs.kernel(specs.Q4_K)], ids=['int4', 'q4_k'])
def test_is_ldlq(spec):
  w, H = problem(256, 16, seed=1)
  factor = hessian.factor(H, 0.01, True)
  a, b = gptq.walk(w, factor, spec), ldlq.ldlq(w, factor, spec)
  assert (a.codes == b.codes).mean() > 0.999                               # A tie in float32 may fall on either side.
  error = lambda q: float(jnp.sum(hessian.objective(qarray.decode(q) - w, H)))
  assert error(a) == pytest.approx(error(b), rel=1e-3) and error(a) < 0.7 * error(qarray.encode(w, spec))


def test_decodes_to_what_the_loop_used():
  w, H = problem(64, 8)
  factor, spec = hessian.factor(H), specs.kernel(specs.Q4_1)
  scale, zero = rtn.place(w, spec)
  points = rtn.points(scale, zero, spec, w.shape)
  units = jax.jit(gptq.round_rows)(w, jnp.linalg.inv(factor.R), points)
  q = qarray.QArray(spec.format.encode(units), scale, zero, spec)
  np.testing.assert_array_equal(qarray.decode(q), jax.jit(lambda u: points.numbers(u))(units))


def test_dead_inputs_get_the_weight_zero_and_singular_ones_are_finite():
  w, H = problem(64, 8, rows=16)
  H[5], H[:, 5] = 0, 0
  q = gptq.gptq(w, H, specs.integer(4, (32, 1)), act_order=True)
  value = qarray.decode(q)
  assert jnp.isfinite(value).all() and (value[5] == 0).all() and (value[6] != 0).any()


@pytest.mark.parametrize('broken, message', [(np.nan, 'rounded to nearest'), (-1.0, 'damped by')])
def test_falls_back_loudly(broken, message):
  w, H = problem(64, 8)
  H[3, 3] = broken
  spec = specs.integer(4, (32, 1))
  with pytest.warns(UserWarning, match=message):
    q = gptq.gptq(w, H, spec)
  assert jnp.isfinite(qarray.decode(q)).all()
  if np.isnan(broken):
    np.testing.assert_array_equal(q.codes, qarray.encode(w, spec).codes)


def test_takes_given_scales_and_zeros():
  w, H = problem(64, 8)
  spec = specs.affine(4, (64, 1))
  q = gptq.gptq(w, H, spec, jnp.full((1, 8), 0.5), jnp.full((1, 8), 8.0))
  assert (q.scale == 0.5).all() and (qarray.decode(q.zero) == 8).all()


@pytest.mark.slow
def test_a_layer_of_1024_by_1024_is_solved_in_a_second():
  w, H = problem(1024, 1024, rows=1024)
  spec, times = specs.integer(4, (64, 1)), []
  for _ in range(4):
    start = time.monotonic()
    jax.block_until_ready(gptq.gptq(w, H, spec, act_order=True))
    times.append(time.monotonic() - start)
  assert times[0] < 20 and min(times[1:]) < 1
