"""EfficientQAT's quantizer against Chen et al. 2024 (https://arxiv.org/abs/2407.11062), Eqs. 1-5."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.core import qarray, ranges, specs
from qat.quantizers import base, efficient, lsq

W = jax.random.normal(jax.random.key(0), (32, 8)) + 0.2
AFFINE, SYMMETRIC = specs.affine(3, (16, 1)), specs.integer(3, (16, 1))


def blocks(w):
  return np.float64(w).reshape(2, 16, 8)


def test_values_and_gradients_are_eqs_1_to_5():
  quantizer = efficient.LearnedGrid(AFFINE, ranges.Search(lowest=0.5, steps=2)).for_weight(W)
  quantizer.s[...] = quantizer.s[...] * 0.8
  quantizer.z[...] = quantizer.z[...] + 0.3                               # Rounded back, on the way forth.
  s, z = (np.float64(v[...])[:, None] for v in (quantizer.s, quantizer.z))
  w, z = blocks(W), np.clip(np.round(z), 0, 7)
  level = np.round(w / s) + z
  np.testing.assert_allclose(blocks(quantizer(W)), s * (np.clip(level, 0, 7) - z), atol=1e-5)
  inside = (level >= 0) & (level <= 7)
  assert 0.5 < inside.mean() < 0.95
  by, by_w = nnx.grad(lambda q, w: q(w).sum(), argnums=(0, 1))(quantizer, W)
  want_s = np.where(inside, np.round(w / s) - w / s, np.clip(level, 0, 7) - z)            # Eq. (3)
  np.testing.assert_allclose(by['s'][...], want_s.sum(1), atol=1e-3)
  np.testing.assert_allclose(by['z'][...], np.where(inside, 0, -s).sum(1), atol=1e-4)     # Eq. (4)
  np.testing.assert_allclose(blocks(by_w), inside, atol=1e-6)                            # Eq. (5)


def test_without_a_zero_it_is_lsq_with_a_gradient_scale_of_1():
  quantizer = efficient.LearnedGrid(SYMMETRIC, ranges.lsq_init).for_weight(W)
  s = quantizer.s[...]
  np.testing.assert_array_equal(quantizer(W), lsq.lsq(W, s, SYMMETRIC, 1.0))
  got = nnx.grad(lambda q: jnp.sum(q(W) ** 2))(quantizer)['s'][...]
  want = jax.grad(lambda s: jnp.sum(lsq.lsq(W, s, SYMMETRIC, 1.0) ** 2))(s)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_it_starts_from_round_to_nearest_on_the_rules_grid():
  quantizer = efficient.LearnedGrid(AFFINE).for_weight(W)
  got, near = quantizer.encode(W), qarray.encode(W, AFFINE)
  np.testing.assert_array_equal(got.codes, near.codes)
  assert isinstance(quantizer.s, base.StepSize) and isinstance(quantizer.z, base.StepSize)
  assert len(jax.tree.leaves(nnx.state(quantizer.frozen(), nnx.Param))) == 0
