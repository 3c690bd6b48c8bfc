import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, ranges, specs
from qat.core.qarray import Spec, Zero
from qat.ptq import rtn

NAMED = {n: specs.kernel(s) for n, s in vars(specs).items() if isinstance(s, Spec) and s.block is not None}
GRIDS = NAMED | dict(affine=specs.affine(4, (32, 1)), float_zero=Spec(formats.UINT4, (64, 1), zero=Zero()),
                     tensor=specs.integer(4, (...,)), tiles=specs.integer(4, (32, 8)))


@pytest.fixture(scope='module')
def rounded():
  """Of all grids, in one program: by the grid of each number, and by that of the array."""
  w = np.float32(np.random.default_rng(0).standard_normal((256, 16)))

  @jax.jit
  def both(w):
    def one(spec):
      scale, zero = rtn.place(w, spec)
      points = rtn.points(scale, zero, spec, w.shape)
      rows = jax.tree.map(lambda a: a[::-1], points)                       # Rows in another order are the same rows.
      return points.round(w), rows.round(w[::-1])[::-1], qarray.fake(w, spec, scale, zero)
    return {n: one(s) for n, s in GRIDS.items()}

  return both(w)


@pytest.mark.parametrize('name', GRIDS)
def test_points_round_as_the_array_does(rounded, name):
  points, permuted, want = rounded[name]
  np.testing.assert_array_equal(points, want)
  np.testing.assert_array_equal(permuted, want)


def test_nearest_takes_any_range_rule_and_grids_without_scales():
  w = jax.random.normal(jax.random.key(0), (32, 8))
  q = rtn.nearest(w, specs.integer(4, (32, 1)), ranges.midrange)
  np.testing.assert_allclose(q.scale[0], jnp.max(jnp.abs(w), 0) / 7.5, rtol=1e-6)
  np.testing.assert_array_equal(rtn.nearest(w, specs.F16).codes, w.astype(jnp.float16))
