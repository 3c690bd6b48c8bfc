"""Learnable weight clipping against Shao et al. 2023 (https://arxiv.org/abs/2308.13137), Eq. 2."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.core import qarray, specs
from qat.quantizers import base, lwc

W = jax.random.normal(jax.random.key(0), (32, 8)) + 0.2
AFFINE, SYMMETRIC = specs.affine(3, specs.CHANNEL), specs.integer(3, specs.CHANNEL)
sigmoid = lambda v: 1 / (1 + np.exp(-np.float64(v)))


def moved(spec):
  random, quantizer = np.random.default_rng(0), lwc.LWC(spec).for_weight(W)
  for v in (quantizer.gamma, quantizer.beta):
    if v is not None:
      v[...] = jnp.float32(random.uniform(0.5, 2, v.shape))
  return quantizer


def test_values_are_eq_2():
  quantizer = moved(AFFINE)
  s0, z0 = np.float64(quantizer.scale[...]), np.float64(quantizer.zero[...])
  high, low = sigmoid(quantizer.gamma[...]) * (7 - z0) * s0, sigmoid(quantizer.beta[...]) * -z0 * s0
  h = (high - low) / 7
  z = np.clip(-np.round(low / h), 0, 7)
  np.testing.assert_allclose(quantizer(W), h * (np.clip(np.round(np.float64(W) / h) + z, 0, 7) - z), atol=1e-5)


def test_without_a_zero_one_factor_serves_both_ends():
  quantizer = moved(SYMMETRIC)
  h = np.abs(np.float64(W)).max(0, keepdims=True) * sigmoid(quantizer.gamma[...]) / 3
  np.testing.assert_allclose(quantizer(W), h * np.clip(np.round(np.float64(W) / h), -4, 3), atol=1e-5)
  assert quantizer.beta is None
  got = nnx.grad(lambda q: q(W).sum())(quantizer)['gamma'][...]
  u = np.float64(W) / h
  level = np.clip(np.round(u), -4, 3)
  by_h = np.where((u >= -4) & (u <= 3), level - u, level).sum(0, keepdims=True)
  slope = sigmoid(quantizer.gamma[...]) * (1 - sigmoid(quantizer.gamma[...]))
  np.testing.assert_allclose(got, by_h * slope * np.abs(np.float64(W)).max(0) / 3, rtol=1e-3, atol=1e-4)


def test_it_starts_at_the_sigmoid_of_4():
  quantizer = lwc.LWC(SYMMETRIC).for_weight(W)
  scale, _ = qarray.absmax(W, SYMMETRIC)
  np.testing.assert_allclose(quantizer.encode(W).scale, scale * 0.98201379, rtol=1e-6)
  assert isinstance(quantizer.gamma, base.StepSize)


def test_no_range_grows():
  quantizer = moved(AFFINE)
  quantizer.gamma[...] = quantizer.beta[...] = jnp.full((1, 8), 99.0)
  whole = qarray.encode(W, AFFINE)
  np.testing.assert_array_equal(quantizer.encode(W).codes, whole.codes)
