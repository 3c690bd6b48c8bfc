"""The levels next to a number, against the sorted list of levels; and gradients through grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, specs
from qat.quantizers import neighbours

ONE = jnp.ones((1, 1))
FORMATS = {'int3': formats.INT3, 'uint2': formats.UINT2, 'ternary': formats.TERNARY, 'binary': formats.BINARY,
           'e2m1': formats.FP4_E2M1, 'e4m3': formats.FP8_E4M3, 'nf4': codebooks.NF4}


@pytest.mark.parametrize('name', FORMATS)
def test_they_are_those_of_the_sorted_levels(name):
  format = FORMATS[name]
  levels = np.array(format.levels(), np.float32)
  x = np.random.default_rng(0).uniform(1.3 * levels[0] - 0.3, 1.3 * levels[-1] + 0.3, (1, 500)).astype(np.float32)
  low, high, fraction, up = jax.jit(lambda x: neighbours.between(
      x, qarray.Spec(format, specs.TENSOR), ONE, None))(x)
  i = np.clip(np.searchsorted(levels, x, side='right') - 1, 0, len(levels) - 2)
  inside = (levels[0] <= x) & (x <= levels[-1])
  np.testing.assert_array_equal(np.asarray(low)[inside], levels[i][inside])
  np.testing.assert_array_equal(np.asarray(high)[inside], levels[i + 1][inside])
  want = (x - levels[i]) / (levels[i + 1] - levels[i])
  np.testing.assert_allclose(np.asarray(fraction)[inside], want[inside], atol=1e-5)
  clear = inside & (np.abs(want - 0.5) > 1e-3)
  np.testing.assert_array_equal(np.asarray(up)[clear], (want > 0.5)[clear])
  if name != 'binary':  # Whose weights are free wherever they are.
    np.testing.assert_array_equal(np.asarray(low)[~inside], np.clip(x, levels[0], levels[-1])[~inside])
    np.testing.assert_array_equal(np.asarray(high)[~inside], np.asarray(low)[~inside])


GRIDS = {'affine': specs.affine(3, (8, 1)), 'minimum': specs.kernel(specs.Q4_1), 'symmetric': specs.integer(3, (8, 1)),
         'nvfp4': specs.kernel(specs.NVFP4)}


@pytest.mark.parametrize('name', GRIDS)
def test_the_nearest_of_them_is_what_encode_takes(name):
  spec = GRIDS[name]
  x = jax.random.normal(jax.random.key(0), (64, 16))
  q = qarray.encode(x, spec)
  near = neighbours.between(x, spec, q.scale, q.zero).nearest
  np.testing.assert_array_equal(neighbours.numbers(near, spec, q.scale, q.zero), qarray.decode(q))
  np.testing.assert_array_equal(spec.format.encode(near), q.codes)


def test_ties_are_those_of_encode():
  x = jnp.arange(-9, 9).reshape(1, -1) / 2                                # Half of them are ties.
  for spec in (specs.integer(4, specs.TENSOR), specs.affine(4, specs.TENSOR)):
    zero = None if spec.zero is None else jnp.full((1, 1), 7.0)           # Odd: round(x + 7) would differ.
    q = qarray.encode(x, spec, ONE, zero)
    near = neighbours.between(x, spec, q.scale, q.zero).nearest
    np.testing.assert_array_equal(spec.format.encode(near), q.codes)


def test_gradients_of_a_grid_with_a_zero():
  """w_hat = s (clip(round(w / s) + z, 0, 3) - z), straight through the rounding: by hand."""
  spec = qarray.Spec(formats.UINT2, specs.TENSOR, zero=qarray.Zero(formats.UINT2))
  w, s, z = jnp.array([[-3.0, -0.6, 0.2, 1.4, 4.0]]), jnp.full((1, 1), 0.5), jnp.full((1, 1), 1.0)
  y = neighbours.on_grid(w, spec, s, z)                                   # w / s + z: -5, -.2, 1.4, 3.8, 9
  np.testing.assert_array_equal(y[0], np.float32([-0.5, -0.5, 0.0, 1.0, 1.0]))
  by = jax.jacobian(lambda w, s, z: neighbours.on_grid(w, spec, s, z)[0], argnums=(0, 1, 2))(w, s, z)
  np.testing.assert_allclose(np.diag(by[0][:, 0]), [0, 1, 1, 0, 0], atol=1e-6)
  # Within: round(w / s) - w / s. Beyond: the level less the zero.
  np.testing.assert_allclose(by[1][:, 0, 0], [-1, -1 + 1.2, 0 - 0.4, 2, 2], atol=1e-6)
  np.testing.assert_allclose(by[2][:, 0, 0], [-0.5, 0, 0, -0.5, -0.5], atol=1e-6)


def test_gradients_equal_the_surrogates_finite_difference():
  """With the residual of the rounding held, and what is clipped, w_hat = s (clip(w / s + z + r, 0, 15) - z)."""
  w = np.random.default_rng(0).normal(size=(8, 4))
  s, z = np.full((1, 4), 0.13), np.full((1, 4), 6.0)
  r = np.round(w / s) - w / s
  level = np.round(w / s) + z
  clipped = (level < 0) | (level > 15)
  f = lambda w, s, z: s * (np.where(clipped, np.clip(level, 0, 15), w / s + z + r) - z)
  got = jax.grad(lambda *a: neighbours.on_grid(*a[:1], specs.affine(4, specs.CHANNEL), *a[1:]).sum(), argnums=(1, 2))(
      *(jnp.float32(a) for a in (w, s, z)))
  for i, g in zip((1, 2), got):
    up, down = ([a + sign * 1e-6 * (j == i) for j, a in enumerate((w, s, z))] for sign in (1, -1))
    np.testing.assert_allclose(g[0], ((f(*up) - f(*down)) / 2e-6).sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('spec', [specs.integer(3, (8, 1)), specs.affine(3, (8, 1))], ids=['symmetric', 'affine'])
def test_whole_ranges_are_the_given_ones_bit_for_bit(spec):
  x = jax.random.normal(jax.random.key(0), (64, 16))
  scale, zero = (qarray.decode(a) for a in qarray.absmax(x, spec))
  one = jnp.ones_like(scale)
  new = neighbours.rescaled(scale, zero, spec, one, one)
  _, hard = neighbours.placed(*new, spec)
  np.testing.assert_array_equal(hard[0], scale)
  if zero is not None:
    np.testing.assert_array_equal(qarray.decode(hard[1]), zero)
    half = neighbours.rescaled(scale, zero, spec, one / 2, one / 4)        # -> [low / 2, high / 4]
    np.testing.assert_allclose(half[0] * 7, scale * ((7 - zero) / 4 + zero / 2), rtol=1e-5)
    np.testing.assert_allclose(-half[1] * half[0], -zero * scale / 2, rtol=1e-5, atol=1e-6)


def test_a_bound_lets_go_of_what_comes_back():
  slope = lambda p, sign: jax.grad(lambda p: sign * neighbours.bounded(p, -0.5, 0.5).sum())(jnp.float32(p))
  for p, outwards in ((0.6, -1), (0.5, -1), (-0.6, 1), (-0.5, 1)):
    assert slope(p, outwards) == 0 and slope(p, -outwards) == -outwards
  assert slope(0.2, 1) == 1 and neighbours.bounded(jnp.float32(0.6), -0.5, 0.5) == 0.5


def test_grids_without_a_step_are_refused():
  with pytest.raises(ValueError, match='its block is None'):
    neighbours.check('AdaRound', specs.F16)
  with pytest.raises(ValueError, match='a zero in units of the codes needs integers'):
    neighbours.check('AdaRound', qarray.Spec(formats.FP4_E2M1, (8, 1), zero=qarray.Zero()))
