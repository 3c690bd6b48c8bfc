"""LLM.int8()'s inputs against qat/ptq/llm_int8.py, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import qarray, specs
from qat.ptq import llm_int8
from qat.quantizers import outliers
from qat.quantizers.static import Static
from qat.quantizers.ste import STE

TOKEN = STE(specs.integer(8, specs.TOKEN, narrow=True))


def test_columns_with_an_outlier_stay_and_have_no_part_in_ranges():
  x = jnp.array([[[0.3, -7.0, 1.27]], [[0.5, 0.1, -0.635]]])
  got = outliers.KeepOutliers(TOKEN)(x)
  np.testing.assert_array_equal(got[..., 1], x[..., 1])
  np.testing.assert_allclose(got[..., 0], [[0.3], [0.5]], atol=0.005)     # 1.27 / 127 = 0.01 and 0.005 are the steps.
  np.testing.assert_allclose(got[..., 2], x[..., 2], rtol=1e-6)


def test_without_outliers_the_product_is_that_of_the_papers():
  x, w = jax.random.normal(jax.random.key(0), (8, 16)), jax.random.normal(jax.random.key(1), (16, 4))
  want, kept = llm_int8.matmul(x, w)
  w_hat = qarray.fake(w, llm_int8.CHANNEL)
  got = jax.jit(lambda x: outliers.KeepOutliers(TOKEN)(x) @ w_hat)(x)
  assert not kept.any()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_straight_through():
  x = jnp.array([[0.3, -7.0], [0.5, 0.1]])
  np.testing.assert_array_equal(jax.grad(lambda x: outliers.KeepOutliers(TOKEN)(x).sum())(x), jnp.ones((2, 2)))


def test_calibrated_ranges_are_refused():
  with pytest.raises(ValueError, match='finds ranges anew'):
    outliers.KeepOutliers(Static(specs.integer(8, specs.TENSOR)))
