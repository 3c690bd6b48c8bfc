"""Convolutions as the CPU likes them are those of lax."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.models import convolve

NHWC = dict(dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
SHAPES = {  # x, w, strides, padding, settings
    'depthwise': ((2, 9, 8, 6), (3, 3, 1, 6), (1, 1), 'SAME', dict(feature_group_count=6)),
    'stride 2': ((2, 9, 8, 6), (5, 5, 1, 6), (2, 2), 'SAME', dict(feature_group_count=6)),
    'valid': ((2, 9, 8, 6), (3, 2, 1, 6), (2, 1), 'VALID', dict(feature_group_count=6)),
    'explicit': ((2, 9, 8, 6), (3, 3, 1, 6), (1, 1), ((2, 0), (1, 1)), dict(feature_group_count=6)),
    '1 x 1': ((2, 9, 8, 6), (1, 1, 6, 5), (1, 1), 'SAME', {}),
    '1 x 1, padded': ((2, 9, 8, 6), (1, 1, 6, 5), (1, 1), ((1, 0), (0, 0)), {}),
    '1 x 1, stride 2': ((2, 9, 8, 6), (1, 1, 6, 5), (2, 2), 'SAME', {}),
    'dense': ((2, 9, 8, 6), (3, 3, 6, 5), (1, 1), 'SAME', {}),
    'groups': ((2, 9, 8, 6), (3, 3, 2, 6), (1, 1), 'SAME', dict(feature_group_count=3)),
    'dilated': ((2, 9, 8, 6), (3, 3, 1, 6), (1, 1), 'SAME', dict(feature_group_count=6, rhs_dilation=(2, 2))),
}


@pytest.mark.parametrize('name', SHAPES)
def test_numbers_and_gradients_are_those_of_lax(name):
  x_shape, w_shape, strides, padding, settings = SHAPES[name]
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (x_shape, w_shape))

  @jax.jit
  def both(x, w):
    ours = lambda x, w: convolve.convolve(x, w, strides, padding, **settings, **NHWC)
    lax_ = lambda x, w: lax.conv_general_dilated(x, w, strides, padding, **settings, **NHWC)
    return [(f(x, w), jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))(x, w)) for f in (ours, lax_)]

  ours, theirs = both(x, w)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, theirs)
