import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import hessian, solvers
from qat.ptq.moments import Moments

SOLVERS = [solvers.NEAREST, solvers.GPTQ(), solvers.LDLQ(), solvers.QuantEase(), solvers.HQQ()]
SPEC = specs.integer(3, (32, 1))
names = pytest.mark.parametrize('solver', SOLVERS, ids=lambda s: type(s).__name__)


def problem():
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[1], (256, 64)) @ jax.random.normal(keys[2], (64, 64))
  return jax.random.normal(keys[0], (64, 8)), Moments.of(x)


@names
def test_gives_a_qarray_of_the_spec_and_plain_notes(solver):
  w, moments = problem()
  q, notes = solver(w, moments, SPEC)
  assert isinstance(q, qarray.QArray) and q.spec == SPEC and q.shape == (64, 8)
  assert all(isinstance(v, int | float | str) for v in notes.values()) and 'fallback' not in notes
  assert hash(solver) == hash(type(solver)())


def test_better_solvers_have_smaller_errors():
  w, moments = problem()
  error = lambda solver: float(hessian.objective(qarray.decode(solver(w, moments, SPEC)[0]) - w, moments.H).sum())
  nearest, gptq, refined = (error(s) for s in (solvers.NEAREST, solvers.GPTQ(), solvers.QuantEase()))
  assert gptq < 0.6 * nearest and refined < 0.95 * gptq
  assert error(solvers.LDLQ()) == pytest.approx(gptq, rel=1e-3)


@names
@pytest.mark.parametrize('second', [np.nan, 0.0], ids=['nan', 'no rows'])
def test_moments_that_say_nothing_leave_round_to_nearest(solver, second):
  w, moments = problem()
  broken = Moments(jnp.int32(0), jnp.full((64, 64), second), jnp.zeros(64), jnp.zeros(64))
  q, notes = solver(w, broken, SPEC)
  if not isinstance(solver, solvers.HQQ):                                  # It looks at no inputs.
    np.testing.assert_array_equal(q.codes, qarray.encode(w, SPEC).codes)
  if isinstance(solver, solvers.GPTQ | solvers.LDLQ | solvers.QuantEase):
    assert 'rounded to nearest' in notes['fallback']
