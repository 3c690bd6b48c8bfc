"""BatchNorm: folding leaves the outputs as they are, and statistics are those of the batches."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.models import cnn
from qat.nn import batch_norm, recipes


def trained(model, x):
  """A model whose norms have statistics and gains."""
  model.train()
  nnx.jit(lambda m, x: m(x))(model, x)
  for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
    if p[...].ndim == 1:
      p[...] = p[...] + 0.1 * jax.random.normal(jax.random.key(i), p.shape)
  model.eval()
  return model


class Convs(nnx.Module):
  """A convolution without a bias, a depthwise one with, a linear layer, and a norm that follows none of them."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (4, 4, 5, 5)])
    self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
    self.linear = nnx.Linear(4, 5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norms[0](self.conv(x)))
    x = self.norms[1](self.depthwise(x)).mean((1, 2))
    return self.norms[3](nnx.relu(self.norms[2](self.linear(x))))


X = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
run = nnx.jit(lambda model, x: model(x))


def test_folding_leaves_the_outputs_as_they_are():
  model = trained(Convs(nnx.Rngs(0)), X)
  folded = qat.fold_batch_norm(model, X)
  kinds = [type(n) for n in folded.norms]
  assert kinds == [batch_norm.Identity] * 3 + [nnx.BatchNorm]
  assert folded.conv.use_bias and folded.conv.bias[...].any() and type(model.norms[0]) is nnx.BatchNorm
  np.testing.assert_allclose(run(folded, X), run(model, X), atol=1e-5)
  assert (np.asarray(folded.conv.kernel[...]) != np.asarray(model.conv.kernel[...])).any()


def test_a_folded_model_quantizes_and_freezes():
  folded = qat.fold_batch_norm(trained(Convs(nnx.Rngs(0)), X), X)
  model = qat.quantize(folded, recipes.get('w8a8'))
  np.testing.assert_array_equal(run(model, X), run(qat.freeze(model), X))
  with pytest.raises(ValueError, match=r"layers \['conv', 'depthwise', 'linear'\] are quantized.*Fold first"):
    qat.fold_batch_norm(model, X)


def test_every_norm_of_the_cnn_is_folded():
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  model = trained(cnn.SeparableCNN((4, 8), nnx.Rngs(0), image_shape=(8, 8, 1)), images)
  folded = qat.fold_batch_norm(model, images)
  assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
  np.testing.assert_allclose(run(folded, images), run(model, images), atol=1e-5)


def test_a_layer_that_another_reads_is_refused():
  class Residual(nnx.Module):
    def __init__(self, rngs):
      self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    def __call__(self, x):
      y = self.linear(x)
      return y + self.norm(y)

  x = jax.random.normal(jax.random.key(0), (8, 4))
  with pytest.raises(ValueError, match=r"\('linear', 'norm'\).* moves the outputs"):
    qat.fold_batch_norm(trained(Residual(nnx.Rngs(0)), x), x)


def test_a_layer_called_twice_keeps_its_norm():
  class Twice(nnx.Module):
    def __init__(self, rngs):
      self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    def __call__(self, x):
      return self.norm(self.linear(self.linear(x)))

  folded = qat.fold_batch_norm(Twice(nnx.Rngs(0)), jnp.ones((2, 4)))
  assert type(folded.norm) is nnx.BatchNorm


def test_statistics_are_the_means_over_batches():
  class One(nnx.Module):
    def __init__(self, rngs):
      self.linear, self.norm = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)
    def __call__(self, x):
      return self.dropout(self.norm(self.linear(x)))

  model = qat.quantize(One(nnx.Rngs(0)), recipes.get('w4a16'))
  batches = [jax.random.normal(jax.random.key(i), (16, 8)) + i for i in range(3)]
  again = qat.reestimate_batch_norm(model, iter(batches))
  hidden = [np.asarray(x @ model.linear.kernel + model.linear.bias[None]) for x in batches]
  np.testing.assert_allclose(again.norm.mean[...], np.mean([h.mean(0) for h in hidden], 0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(again.norm.var[...], np.mean([h.var(0) for h in hidden], 0), rtol=1e-4)
  assert again.norm.momentum == model.norm.momentum == 0.99 and not model.norm.mean[...].any()
  assert again.dropout.deterministic is model.dropout.deterministic


def test_no_batch_is_an_error():
  with pytest.raises(ValueError, match='given no batch'):
    qat.reestimate_batch_norm(Convs(nnx.Rngs(0)), [])
