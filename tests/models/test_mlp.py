from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.models import mlp


def test_applies_relu_between_layers_and_not_after_the_last():
  model = mlp.MLP((2, 2, 1), nnx.Rngs(0))
  model.layers[0].kernel[...] = jnp.array([[1.0, -1.0], [0.0, 0.0]])
  model.layers[1].kernel[...] = jnp.array([[-2.0], [5.0]])
  # [3, 7] -> [3, -3] -> relu [3, 0] -> -6.
  np.testing.assert_array_equal(model(jnp.array([[3.0, 7.0]])), [[-6.0]])


def test_flattens_images():
  model = mlp.MLP((64, 10), nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  np.testing.assert_array_equal(model(x), model(x.reshape(3, 64)))


def test_parameter_count():
  model = mlp.MLP((64, 128, 128, 10), nnx.Rngs(0))
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(p.size for p in params) == (64 + 1) * 128 + (128 + 1) * 128 + (128 + 1) * 10


def test_computes_in_bfloat16_and_keeps_weights_in_float32():
  model = mlp.MLP((4, 8, 2), nnx.Rngs(0), dtype=jnp.bfloat16)
  assert model(jnp.ones((1, 4))).dtype == jnp.bfloat16
  assert model.layers[0].kernel.dtype == jnp.float32


def test_one_size_makes_no_layer():
  with pytest.raises(ValueError, match=r'MLP of sizes \(64,\): 1 sizes make no layer\. Give'):
    mlp.MLP((64,), nnx.Rngs(0))


def test_no_example_gives_no_score():
  assert mlp.MLP((64, 128, 10), nnx.Rngs(0))(jnp.ones((0, 8, 8, 1))).shape == (0, 10)
