"""LSQ's gradients against Esser et al. 2020 (https://arxiv.org/abs/1902.08153), Eqs. 1-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import formats, qarray, specs
from qat.quantizers import base, lsq

INT3 = qarray.Spec(formats.Int(3), specs.TENSOR)  # Q_N = 4, Q_P = 3.
V = jnp.array([[-9.0, -4.2, -1.3, -0.2, 0.0, 0.6, 2.4, 2.9, 3.1, 7.0]])


def by_s(v, s, spec=INT3):
  """dv_hat/ds of each element of v."""
  return jax.jacobian(lambda s: lsq.lsq(v, s, spec, 1.0))(s)[0, :, 0, 0]


def test_values_are_those_of_eqs_1_and_2():
  s = jnp.array([[0.5]])
  want = np.clip(np.round(np.asarray(V) / 0.5), -4, 3) * 0.5
  np.testing.assert_array_equal(lsq.lsq(V, s, INT3, 1.0), want)


def test_the_gradient_of_s_is_eq_3():
  # -Q_N below, Q_P above, and round(v/s) - v/s within.
  want = [-4, -4, 0.3, 0.2, 0, 0.4, -0.4, 0.1, 3, 3]
  np.testing.assert_allclose(by_s(V, jnp.ones((1, 1))), want, atol=1e-6)


def test_the_gradient_of_v_is_eq_5():
  g = jax.grad(lambda v: lsq.lsq(v, jnp.ones((1, 1)), INT3, 1.0).sum())(V)
  np.testing.assert_array_equal(g[0], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0])


def test_the_gradient_of_s_is_a_finite_difference():
  """With the residual r = round(u) - u held, v_hat = s clip(v/s + r), which Eq. (3) differentiates."""
  u = np.array([[-6.0, -2.7, -1.3, 0.2, 1.6, 5.0]])
  s, r = 0.37, np.round(u) - u
  v = u * s
  surrogate = lambda s: s * np.clip(v / s + r, -4, 3)
  step = 1e-4
  slope = (surrogate(s + step) - surrogate(s - step)) / (2 * step)
  np.testing.assert_allclose(by_s(jnp.float32(v), jnp.full((1, 1), s)), slope[0], atol=1e-3)


def test_gradients_are_scaled_by_one_over_root_n_q_p():
  v = jax.random.normal(jax.random.key(0), (8, 4))
  quantizer = lsq.LSQ(specs.integer(3, specs.CHANNEL)).for_weight(v)
  s = quantizer.s[...]
  assert s.shape == (1, 4) and lsq.paper_gradient_scale(v.size, s.size, quantizer.spec) == 1 / np.sqrt(8 * 3)
  graph_gradient = jax.grad(lambda s: lsq.lsq(v, s, quantizer.spec, 1 / np.sqrt(8 * 3)).sum())(s)
  plain = jax.grad(lambda s: lsq.lsq(v, s, quantizer.spec, 1.0).sum())(s)
  np.testing.assert_allclose(graph_gradient, plain / np.sqrt(24), rtol=1e-5, atol=1e-6)


def test_steps_start_at_two_mean_over_root_q_p():
  w = jax.random.normal(jax.random.key(0), (16, 3))
  quantizer = lsq.LSQ(specs.integer(4, specs.CHANNEL)).for_weight(w)
  np.testing.assert_allclose(quantizer.s[...], 2 * np.abs(w).mean(0, keepdims=True) / np.sqrt(7), rtol=1e-6)


def test_a_step_cannot_turn_negative():
  w = jax.random.normal(jax.random.key(0), (16, 3))
  quantizer = lsq.LSQ(specs.integer(4, specs.CHANNEL)).for_weight(w)
  before = quantizer(w)
  quantizer.s = base.StepSize(-quantizer.s[...])
  np.testing.assert_array_equal(quantizer(w), before)


def test_each_matrix_of_a_stack_has_steps_of_its_own():
  w = jax.random.normal(jax.random.key(0), (2, 16, 3)) * jnp.array([1.0, 9.0])[:, None, None]
  for block in (specs.TENSOR, specs.CHANNEL):
    make = lambda w: lsq.LSQ(specs.integer(4, block)).for_weight(w).s[...]
    np.testing.assert_array_equal(make(w), jnp.stack([make(w[0]), make(w[1])]))


def test_a_grid_with_a_zero_is_refused():
  with pytest.raises(ValueError, match='LSQ learns a scale alone. Drop the zero, or use Static'):
    lsq.LSQ(specs.affine(4, specs.TENSOR))


@pytest.mark.parametrize('scale, g', [
    (lsq.paper_gradient_scale, 1 / np.sqrt(50 * 7)), (lsq.by_numbers, 1 / np.sqrt(50)), (lsq.unscaled, 1.0)])
def test_the_gradient_scales_of_the_ablation(scale, g):
  """Of 4 steps of 50 numbers each, at 4 bits."""
  assert scale(200, 4, specs.integer(4, specs.CHANNEL)) == pytest.approx(g)
