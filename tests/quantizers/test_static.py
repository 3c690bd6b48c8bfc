"""Static ranges: codes, and the gradient of a clip (Jacob et al. 2018, https://arxiv.org/abs/1712.05877)."""

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import qarray, specs
from qat.quantizers import base, static

X = jnp.array([[-3.0, -1.1, -0.3, 0.2, 0.8, 1.6, 4.0]])


def test_symmetric_values_and_gradient():
  q = static.Static.at(specs.integer(2, specs.TENSOR), jnp.float32(1.0))       # {-2, -1, 0, 1}
  np.testing.assert_array_equal(q(X)[0], [-2, -1, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(jax.grad(lambda x: q(x).sum())(X)[0], [0, 1, 1, 1, 1, 0, 0])


def test_affine_values_and_gradient():
  q = static.Static.at(specs.affine(2, specs.TENSOR), jnp.float32(1.0), jnp.float32(1.0))  # {-1, 0, 1, 2}
  np.testing.assert_array_equal(q(X)[0], [-1, -1, 0, 0, 1, 2, 2])
  g = jax.grad(lambda x: q(x).sum())(X)[0]
  np.testing.assert_array_equal(g[jnp.array([0, 2, 3, 4, 5, 6])], [0, 1, 1, 1, 1, 0])


def test_a_range_a_channel():
  q = static.Static.at(specs.integer(8, (..., 1)), jnp.array([0.1, 1.0, 10.0]))
  x = jnp.full((2, 4, 3), 5.04)
  np.testing.assert_allclose(q(x)[1, 2], [5.0, 5.0, 10.0], rtol=1e-6)


def test_ranges_are_no_parameters_and_do_not_move():
  w = jax.random.normal(jax.random.key(0), (8, 3))
  q = static.Static(specs.integer(4, specs.CHANNEL)).for_weight(w)
  assert isinstance(q.scale, base.Range)
  np.testing.assert_array_equal(q.encode(2 * w).scale, q.encode(w).scale)
  np.testing.assert_array_equal(qarray.decode(q.encode(2 * w)), jnp.clip(q(2 * w), -8 * q.scale[...], 7 * q.scale[...]))
