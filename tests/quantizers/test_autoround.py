"""SignRound against Cheng et al. 2023 (https://arxiv.org/abs/2309.05516), Eqs. 2-4."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, qarray, specs
from qat.quantizers import autoround

W = jax.random.normal(jax.random.key(0), (32, 8))
AFFINE, SYMMETRIC = specs.affine(3, (8, 1)), specs.integer(3, (8, 1))


def moved(spec, seed=0):
  """A quantizer of W in the midst of training."""
  random, quantizer = np.random.default_rng(seed), autoround.SignRound(spec).for_weight(W)
  quantizer.V[...] = jnp.float32(random.uniform(-0.45, 0.45, W.shape))
  for v in (quantizer.alpha, quantizer.beta):
    if v is not None:
      v[...] = jnp.float32(random.uniform(0.7, 0.95, v.shape))
  return quantizer


def blocks(w):
  return np.float64(w).reshape(4, 8, 8)                                  # [blocks, 8 inputs, out]


def test_values_are_the_papers_with_a_zero():
  quantizer = moved(AFFINE)
  w, V = blocks(W), blocks(quantizer.V[...])
  alpha, beta = (np.float64(v[...])[:, None] for v in (quantizer.alpha, quantizer.beta))
  # The starting range is that of whole zeros.
  s0, z0 = (np.float64(v[...])[:, None] for v in (quantizer.scale, quantizer.zero))
  high, low = (7 - z0) * s0, -z0 * s0
  s = (high * alpha - low * beta) / 7                                     # Eq. (3)
  zp = np.clip(np.round(-low * beta / s), 0, 7)
  want = s * (np.clip(np.floor(w / s + V + 0.5) + zp, 0, 7) - zp)         # Eqs. (2), (4)
  np.testing.assert_allclose(blocks(quantizer(W)), want, atol=1e-5)


def test_values_are_the_papers_without_a_zero():
  quantizer = moved(SYMMETRIC)
  w, V = blocks(W), blocks(quantizer.V[...])
  s = np.abs(w).max(1, keepdims=True) * np.float64(quantizer.alpha[...])[:, None] / 3
  np.testing.assert_allclose(blocks(quantizer(W)), s * np.clip(np.floor(w / s + V + 0.5), -4, 3), atol=1e-5)


def test_the_gradient_of_V_is_the_step_where_nothing_is_clipped():
  quantizer = moved(SYMMETRIC)
  s = np.abs(blocks(W)).max(1, keepdims=True) * np.float64(quantizer.alpha[...])[:, None] / 3
  u = np.floor(blocks(W) / s)
  want = s * ((u >= -4) & (u < 3))
  got = nnx.grad(lambda q: q(W).sum())(quantizer)
  np.testing.assert_allclose(blocks(got['V'][...]), want, atol=1e-5)
  # By alpha: s0 times (level - w / s) within and the level beyond; V is on the surrogate's other side.
  level = blocks(qarray.decode(quantizer.encode(W))) / s
  slope = np.where(want > 0, level - blocks(W) / s, level) * s / np.float64(quantizer.alpha[...])[:, None]
  np.testing.assert_allclose(got['alpha'][...], slope.sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('spec', [AFFINE, SYMMETRIC, specs.kernel(specs.NVFP4), qarray.Spec(codebooks.NF4, (16, 1)),
                                  specs.kernel(specs.Q4_1)], ids=str)
def test_it_starts_from_round_to_nearest(spec):
  near = qarray.encode(W, spec)
  got = autoround.SignRound(spec).for_weight(W).encode(W)
  different = np.asarray(got.codes != near.codes)
  # Where the scales are rounded themselves, and set anew, a tie may fall the other way.
  assert different.mean() <= (0.005 if spec.scale else 0)


@pytest.mark.parametrize('spec', [AFFINE, SYMMETRIC], ids=['affine', 'symmetric'])
def test_it_starts_at_any_codes_of_integers(spec):
  q = qarray.encode(jax.random.normal(jax.random.key(7), W.shape), spec)  # Of another matrix.
  got = autoround.SignRound(spec).starting_at(W, q).encode(W)
  np.testing.assert_array_equal(got.codes, q.codes)
  np.testing.assert_array_equal(qarray.decode(got), qarray.decode(q))
  with pytest.raises(ValueError, match='are not evenly spaced'):
    fp4 = specs.kernel(specs.NVFP4)
    autoround.SignRound(fp4).starting_at(W, qarray.encode(W, fp4))


def test_learned_numbers_are_held_in_their_bounds():
  quantizer = autoround.SignRound(SYMMETRIC).for_weight(W)
  at = lambda V, alpha: autoround.signround(W, V * jnp.ones(W.shape), alpha * jnp.ones((4, 8)), None, SYMMETRIC,
                                            quantizer.scale[...], None)
  for one, other in zip(at(jnp.float32(9), jnp.float32(2)), at(jnp.float32(0.5), jnp.float32(1))):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
      np.testing.assert_array_equal(a, b)


def test_each_matrix_of_a_stack_is_as_alone():
  w = jnp.stack([W, 3 * W[::-1]])
  for spec in (AFFINE, specs.kernel(specs.NVFP4)):
    stack = autoround.SignRound(spec).for_weight(w)
    for i in range(2):
      np.testing.assert_array_equal(stack.scale[i], autoround.SignRound(spec).for_weight(w[i]).scale[...])
  q = jax.vmap(lambda w: qarray.encode(w, AFFINE))(w)
  assert autoround.SignRound(AFFINE).starting_at(w, q).offset.shape == w.shape
