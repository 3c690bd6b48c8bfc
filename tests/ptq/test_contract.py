"""What is true of every solver. A new one joins with a line of MEMBERS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import gptq, hessian, hqq, ldlq, qronos, quantease, scales

GRIDS = dict(int4=specs.integer(4, (32, 1)), nf4=specs.kernel(specs.NF4), mxfp4=specs.kernel(specs.MXFP4),
             int2=specs.integer(2, (32, 1)))
PROBLEMS, INPUTS, OUTPUTS = 50, 64, 8


def output_error(w, H, q):
  """tr(dW^T H dW)."""
  return jnp.sum(hessian.objective(qarray.decode(q) - w, H))


def half_norm(w, H, q):
  """HQQ's: sum |dW|^0.7."""
  return jnp.sum(jnp.abs(qarray.decode(q) - w) ** 0.7)


def drifted(H):
  """X~^T X of a quantized model whose inputs are 3/4 of the float model's, and H that of X~."""
  return H / 0.75


def qronos_error(w, H, q):
  """|X w - X~ w_hat|^2 - |X w - X~ w|^2."""
  step = qarray.decode(q) - w
  return jnp.sum(step * (H @ step - 2 * (drifted(H) - H) @ w))


def refined(w, H, spec):
  return quantease.descend(w, H, scales.refit(w, H, gptq.walk(w, hessian.factor(H), spec)), 2)


MEMBERS = {
    'gptq': (output_error, lambda w, H, spec: gptq.walk(w, hessian.factor(H), spec)),
    'gptq, act-order': (output_error, lambda w, H, spec: gptq.walk(w, hessian.factor(H, 0.01, True), spec)),
    'ldlq': (output_error, lambda w, H, spec: ldlq.ldlq(w, hessian.factor(H), spec)),
    'refit': (output_error, lambda w, H, spec: scales.refit(w, H, qarray.encode(w, spec))),
    'quantease': (output_error, lambda w, H, spec: quantease.descend(w, H, qarray.encode(w, spec), 1)),
    'gptq, refit, quantease': (output_error, refined),
    'qronos': (qronos_error, lambda w, H, spec: qronos.qronos(w, hessian.factor(H), drifted(H), spec)),
    'hqq': (half_norm, lambda w, H, spec: hqq.hqq(w, spec)),
}


@functools.cache
def problems():
  """Weights f32[n, i, o] and Hessians f32[n, i, i] of correlated inputs."""
  rng = np.random.default_rng(0)
  mix = rng.standard_normal((PROBLEMS, INPUTS, INPUTS)) * rng.lognormal(0, 1, (PROBLEMS, 1, INPUTS))
  x = rng.standard_normal((PROBLEMS, 4 * INPUTS, INPUTS)) @ mix
  w = rng.standard_normal((PROBLEMS, INPUTS, OUTPUTS))
  return np.float32(w), np.float32(np.swapaxes(x, 1, 2) @ x / x.shape[1])


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name', MEMBERS)
def test_never_worse_than_round_to_nearest(name, grid):
  error, solve = MEMBERS[name]
  spec, (w, H) = GRIDS[grid], problems()

  @jax.jit
  def errors(w, H):
    return jax.vmap(lambda w, H: (error(w, H, solve(w, H, spec)), error(w, H, qarray.encode(w, spec))))(w, H)

  got, near = errors(w, H)
  assert (got <= near + 1e-5 * np.abs(near)).all()
  if error is output_error and name != 'refit':
    assert np.median(got / near) < 0.7


@pytest.mark.parametrize('grid', GRIDS)
def test_white_inputs_leave_round_to_nearest_as_it_is(grid):
  """Bit for bit, also in the loop, before the better of the two is kept."""
  spec, w = GRIDS[grid], problems()[0][0]
  factor, near = hessian.factor(jnp.eye(INPUTS)), qarray.encode(w, spec)
  np.testing.assert_array_equal(gptq.walk(w, factor, spec).codes, near.codes)
  points = gptq.rtn.points(near.scale, near.zero, spec, w.shape)
  U = jnp.linalg.inv(factor.R)
  np.testing.assert_array_equal(spec.format.encode(jax.jit(gptq.round_rows)(w, U, points)), near.codes)


def test_one_compilation_for_a_shape():
  spec, (w, H) = GRIDS['int4'], problems()
  solve = lambda k: gptq.walk(w[k], hessian.factor(H[k], 0.01, True), spec)
  solve(0)
  sizes = gptq.walk._cache_size(), hessian.factor._cache_size()
  for k in range(1, 4):
    solve(k)
  assert (gptq.walk._cache_size(), hessian.factor._cache_size()) == sizes
