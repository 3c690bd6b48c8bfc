"""BitNet b1.58 against Ma et al. 2024 (https://arxiv.org/abs/2402.17764), Eqs. 1-3."""

import jax
import jax.numpy as jnp
import numpy as np

from qat.quantizers import bitnet


def test_weights_are_eqs_1_to_3():
  w = jax.random.normal(jax.random.key(0), (32, 8))
  gamma = np.abs(np.asarray(w, np.float64)).mean()
  want = np.clip(np.round(np.asarray(w) / gamma), -1, 1)
  q = bitnet.weight()
  np.testing.assert_array_equal(q.encode(w).codes.astype(np.int32), want)
  np.testing.assert_allclose(q(w), want * gamma, rtol=1e-6)
  assert q.encode(w).scale.shape == (1, 1)


def test_inputs_have_a_scale_a_token():
  x = jax.random.normal(jax.random.key(0), (2, 3, 16))
  scale = np.abs(x).max(-1, keepdims=True) / 127
  np.testing.assert_allclose(bitnet.input()(x), np.round(x / scale) * scale, rtol=1e-5, atol=1e-6)


def test_zeros_stay_zeros_and_gradients_finite():
  w = jnp.zeros((4, 4))
  np.testing.assert_array_equal(bitnet.weight()(w), w)
  assert np.isfinite(jax.grad(lambda w: bitnet.weight()(w).sum())(w)).all()
