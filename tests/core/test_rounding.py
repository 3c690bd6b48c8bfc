"""The oracle is Python's decimal module, whose roundings are exact."""

import decimal
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import rounding

DECIMAL = dict(half_even=decimal.ROUND_HALF_EVEN, half_away=decimal.ROUND_HALF_UP,
               floor=decimal.ROUND_FLOOR, ceil=decimal.ROUND_CEILING, truncate=decimal.ROUND_DOWN)
TIES = np.arange(-300.5, 301, 1, np.float32)
WHOLE = np.arange(-300, 301, 1, np.float32)
# floor(x + 1/2) in floats fails on both: the sum rounds.
HARD = np.float32([0.49999997, -0.49999997, 2.0**23 + 1, -(2.0**23) - 1, 2.0**22 + 0.5])
NUMBERS = np.concatenate([TIES, np.nextafter(TIES, -np.inf), np.nextafter(TIES, np.inf), WHOLE, HARD])


@pytest.mark.parametrize('name', DECIMAL)
def test_equals_decimal(name):
  want = [float(decimal.Decimal(float(x)).quantize(decimal.Decimal(1), DECIMAL[name])) for x in NUMBERS]
  np.testing.assert_array_equal(jax.jit(getattr(rounding, name))(NUMBERS), want)


def test_half_up_equals_the_exact_floor():
  want = [math.floor(decimal.Decimal(float(x)) + decimal.Decimal('0.5')) for x in NUMBERS]
  np.testing.assert_array_equal(jax.jit(rounding.half_up)(NUMBERS), np.float32(want))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', [*DECIMAL, 'half_up'])
def test_keeps_the_dtype(name, dtype):
  assert getattr(rounding, name)(jnp.ones(3, dtype)).dtype == dtype


def test_stochastic_is_unbiased():
  n = 20000
  u = np.repeat(np.float32([-2.75, -0.5, 0.1, 0.5, 1.9]), n).reshape(5, n)
  up = np.asarray(jax.jit(rounding.Stochastic(jax.random.key(0)))(u))
  assert set(np.unique(up - np.floor(u))) == {0.0, 1.0}
  share = u[:, 0] - np.floor(u[:, 0])
  five_sigma = 5 * np.sqrt(share * (1 - share) / n)
  assert (np.abs(up.mean(1) - u[:, 0]) < five_sigma).all()


def test_stochastic_leaves_whole_numbers_and_draws_the_same_for_the_same_key():
  rule = rounding.Stochastic(jax.random.key(1))
  np.testing.assert_array_equal(rule(WHOLE), WHOLE)
  np.testing.assert_array_equal(rule(TIES), rule(TIES))
  assert (rule(TIES) != rounding.Stochastic(jax.random.key(2))(TIES)).any()
