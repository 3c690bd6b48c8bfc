import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.models import cnn

NETWORKS = dict(cnn=cnn.CNN, separable=cnn.SeparableCNN)


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def build(request):
  return functools.partial(request.param, channels=(4, 8), rngs=nnx.Rngs(0), image_shape=(8, 8, 1))


@pytest.mark.parametrize('image_shape, places', [((8, 8, 1), 2 * 2), ((7, 5, 3), 2 * 2), ((28, 28, 1), 7 * 7)])
def test_each_block_but_the_first_halves_the_image(build, image_shape, places):
  """Rounded up: 7 -> 4 -> 2, and 5 -> 3 -> 2."""
  model = build(image_shape=image_shape, channels=(4, 4, 8))
  assert model.head.in_features == places * 8
  logits = nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, *image_shape)))
  assert logits.shape == (2, 10) and jnp.isfinite(logits).all()


def test_eval_normalizes_each_example_by_itself(build):
  model = build()
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  forward = nnx.jit(lambda m, x: m(x))
  model.train()
  assert not np.allclose(forward(model, x)[:1], forward(model, x[:1]), atol=1e-3)
  model.eval()
  np.testing.assert_allclose(forward(model, x)[:1], forward(model, x[:1]), atol=1e-5)


def test_train_moves_the_running_averages_and_eval_does_not(build):
  model = build()
  norm = model.blocks[0].norm
  forward = nnx.jit(lambda m, x: m(x))
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  model.eval()
  forward(model, x)
  np.testing.assert_array_equal(norm.var[...], jnp.ones(4))
  model.train()
  y = model.blocks[0].conv(x)
  forward(model, x)
  np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-4)


def test_parameter_counts():
  count = lambda m: sum(p.size for p in jax.tree.leaves(nnx.state(m, nnx.Param)))
  first, head = 9 * 4 + 2 * 4, (4 * 4 * 8 + 1) * 10  # 3x3 kernel, BatchNorm's scale and bias; linear and bias
  assert count(cnn.CNN((4, 8), nnx.Rngs(0), image_shape=(8, 8, 1))) == first + (9 * 4 * 8 + 2 * 8) + head
  assert count(cnn.SeparableCNN((4, 8), nnx.Rngs(0), image_shape=(8, 8, 1))) == (
      first + (9 * 4 + 2 * 4) + (4 * 8 + 2 * 8) + head)


def test_depthwise_channels_do_not_mix():
  block = cnn.SeparableBlock(3, 3, 1, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
  changed = block.depthwise(x.at[..., 1].add(1.0)) != block.depthwise(x)
  assert changed[..., 1].any() and not changed[..., 0].any() and not changed[..., 2].any()


def test_computes_in_bfloat16_and_keeps_statistics_in_float32(build):
  model = build(dtype=jnp.bfloat16)
  assert model(jnp.ones((1, 8, 8, 1))).dtype == jnp.bfloat16
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}


def test_no_channels_is_an_error():
  with pytest.raises(ValueError, match='CNN of no channels: .* Give one number a block'):
    cnn.CNN((), nnx.Rngs(0))


def test_another_image_shape_is_an_error(build):
  with pytest.raises(ValueError, match=r'images of shape \(28, 28, 1\): it was built for \(8, 8, 1\)'):
    build()(jnp.ones((1, 28, 28, 1)))
