"""FlexRound against Lee et al. 2023 (https://arxiv.org/abs/2306.00317), Eq. 2 and Proposition 3.1."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.core import qarray, ranges, specs
from qat.quantizers import base, flexround

W = jax.random.normal(jax.random.key(0), (32, 8))
SPEC = specs.integer(4, specs.CHANNEL)


def parts():
  random = np.random.default_rng(0)
  return random.uniform(0.2, 0.3, (1, 8)), random.uniform(0.8, 1.2, (32, 8)), random.uniform(0.9, 1.1, (1, 8))


def test_values_are_eq_2():
  s1, S2, s3 = parts()
  got = flexround.flexround(W, *(jnp.float32(a) for a in (s1, S2, s3)), SPEC)
  np.testing.assert_allclose(got, s1 * np.clip(np.round(W / (s1 * S2 * s3)), -8, 7), atol=1e-5)


def test_gradients_are_straight_through_and_that_of_S2_is_proportional_to_W():
  s1, S2, s3 = parts()
  s1 = s1 / 2                                                             # Clips some.
  grad = jax.grad(lambda *a: flexround.flexround(W, *a, SPEC).sum(), argnums=(0, 1, 2))
  got = grad(*(jnp.float32(a) for a in (s1, S2, s3)))
  u = np.float64(W) / (s1 * S2 * s3)
  inside = (u >= -8) & (u <= 7)
  assert 0.5 < inside.mean() < 0.98
  level = np.clip(np.round(u), -8, 7)
  np.testing.assert_allclose(got[0], np.where(inside, level - u, level).sum(0, keepdims=True), atol=1e-3)
  by_divisor = np.where(inside, -np.float64(W) / (S2 * s3), 0)
  np.testing.assert_allclose(got[1], by_divisor / S2, atol=1e-4)
  np.testing.assert_allclose(got[2], (by_divisor / s3).sum(0, keepdims=True), atol=1e-3)
  one = jnp.ones((1, 8))
  at_one = jax.grad(lambda S2: flexround.flexround(W, one, S2, one, SPEC).sum())(jnp.ones((32, 8)))
  np.testing.assert_allclose(np.abs(at_one), np.abs(W), atol=1e-6)       # Proposition 3.1.


def test_it_starts_from_round_to_nearest():
  quantizer = flexround.FlexRound(SPEC).for_weight(W)
  np.testing.assert_array_equal(quantizer.encode(W).codes, qarray.encode(W, SPEC, *ranges.Search()(W, SPEC)).codes)
  assert isinstance(quantizer.s1, base.StepSize) and isinstance(quantizer.log_S2, base.Rounding)


def test_a_divisor_can_move_a_code_by_more_than_one():
  quantizer = flexround.FlexRound(SPEC).for_weight(W)
  before = quantizer.encode(W).codes.astype(jnp.int32)
  quantizer.log_S2[...] = jnp.full(W.shape, jnp.log(2.0))
  after = quantizer.encode(W).codes.astype(jnp.int32)
  assert jnp.max(jnp.abs(after - before)) > 1
  np.testing.assert_array_equal(after, qarray.encode(W / 2, SPEC, quantizer.s1[...]).codes)


def test_a_stack_has_divisors_of_its_own():
  w = jnp.stack([W, W + 1])
  quantizer = flexround.FlexRound(specs.affine(4, (8, 1))).for_weight(w)
  assert quantizer.log_S2.shape == w.shape and quantizer.log_s3.shape == (2, 1, 8) and quantizer.s1.shape == (2, 4, 8)
  assert len(jax.tree.leaves(nnx.state(quantizer.frozen(), nnx.Param))) == 0
