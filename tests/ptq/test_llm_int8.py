import jax
import jax.numpy as jnp
import numpy as np

from qat.ptq import llm_int8


def problem(outliers=(3, 17)):
  x = jax.random.normal(jax.random.key(0), (20, 64))
  w = jax.random.normal(jax.random.key(1), (64, 12))
  return x.at[4, jnp.array(outliers)].set(60.0), w


def test_is_the_papers_equation():
  """Eq. (8) in numpy: float columns, and absmax int8 of the rest, by row of x and by column of w."""
  x, w = (np.asarray(a, np.float64) for a in problem())
  kept = (np.abs(x) >= 6).any(0)
  a, b = x[:, ~kept], w[~kept]
  ca, cb = 127 / np.abs(a).max(1, keepdims=True), 127 / np.abs(b).max(0, keepdims=True)
  want = x[:, kept] @ w[kept] + np.rint(a * ca) @ np.rint(b * cb) / (ca * cb)
  y, found = llm_int8.matmul(*problem())
  np.testing.assert_array_equal(found, kept)
  np.testing.assert_allclose(y, want, atol=2e-2)                           # A tie in float32: one step of 0.01.
  assert np.median(np.abs(y - want)) < 1e-4


def test_outliers_cost_vectorwise_int8_its_precision():
  x, w = problem()
  error = lambda threshold: float(jnp.linalg.norm(llm_int8.matmul(x, w, threshold)[0] - x @ w))
  assert error(llm_int8.THRESHOLD) < 0.3 * error(float('inf'))
  assert error(0.0) < 1e-3


def test_bits_and_types():
  x, w = problem()
  y, kept = llm_int8.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16 and int(kept.sum()) == 2
  assert float(llm_int8.bits_per_weight(kept)) == 8 + 8 * 2 / 64 + 16 / 64
