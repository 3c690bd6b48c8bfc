from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

import qat
from qat.models import efficientnet
from qat.models.efficientnet import Stage
from qat.nn import batch_norm, recipes

TINY = efficientnet.Config(
    (Stage(1, 3, 1, 1, 4), Stage(2, 5, 2, 3, 6)), image_size=17, stem_width=8, head_width=12, classes=5)
IMAGES = np.random.default_rng(0).normal(size=(2, 17, 18, 3)).astype(np.float32)
forward = nnx.jit(lambda model, x: model(x))


def build(config=TINY):
  """A model in evaluation mode whose norms have statistics and gains."""
  model = efficientnet.EfficientNet(config, nnx.Rngs(0))
  random = np.random.default_rng(1)
  for path, p in nnx.to_flat_state(nnx.state(model)):
    if path[-1] in ('mean', 'bias'):
      p[...] = jnp.asarray(random.normal(size=p.shape) * 0.3, jnp.float32)
    elif path[-1] in ('var', 'scale'):
      p[...] = jnp.asarray(random.uniform(0.5, 3.0, size=p.shape), jnp.float32)
  model.eval()
  return model


@pytest.fixture(scope='module')
def model():
  return build()


def convolve(image, kernel, stride, groups):
  """A convolution in float64 by scipy's, with TensorFlow's SAME padding: the greater half goes behind."""
  size = kernel.shape[0]
  pads = []
  for n in image.shape[:2]:
    whole = max((-(-n // stride) - 1) * stride + size - n, 0)
    pads.append((whole // 2, whole - whole // 2))
  x = np.pad(image, (*pads, (0, 0)))
  inputs, outputs = kernel.shape[2], kernel.shape[3]
  y = np.zeros((x.shape[0] - size + 1, x.shape[1] - size + 1, outputs))
  for o in range(outputs):
    first = o // (outputs // groups) * inputs
    for i in range(inputs):
      y[:, :, o] += scipy.signal.correlate(x[:, :, first + i], kernel[:, :, i, o], 'valid')
  return y[::stride, ::stride]


def layer(x, w, stride=1, groups=1):
  """ConvNorm in float64."""
  norm = w['norm']
  y = convolve(x, w['conv']['kernel'], stride, groups)
  return (y - norm['mean']) / np.sqrt(norm['var'] + 1e-3) * norm['scale'] + norm['bias']


def relu6(x):
  return np.clip(x, 0, 6)


def bottleneck(x, w, stride):
  y = relu6(layer(x, w['expand'])) if 'expand' in w else x
  y = relu6(layer(y, w['depthwise'], stride, groups=y.shape[2]))
  y = layer(y, w['project'])
  return x + y if y.shape == x.shape else y


def test_the_forward_is_that_of_the_paper(model):
  """Odd and even sizes, strides 1 and 2, kernels of 3 and 5, with and without expansion and residual."""
  w = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(model)))
  for image, logits in zip(IMAGES.astype(np.float64), forward(model, IMAGES)):
    x = relu6(layer(image, w['stem'], 2))
    for block, stride in zip(w['blocks'].values(), (1, 2, 1)):
      x = bottleneck(x, block, stride)
    x = relu6(layer(x, w['top'])).mean((0, 1))
    np.testing.assert_allclose(logits, x @ w['head']['kernel'] + w['head']['bias'], atol=2e-5)


def test_the_network_has_the_parts_that_the_reference_walks(model):
  assert [block.expand is None for block in model.blocks] == [True, False, False]
  assert [block.residual for block in model.blocks] == [False, False, True]


# Millions, as published: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
@pytest.mark.parametrize('config, published', [
    (efficientnet.LITE0, 4.7), (efficientnet.LITE1, 5.4), (efficientnet.LITE2, 6.1), (efficientnet.LITE3, 8.2),
    (efficientnet.LITE4, 13.0)], ids=['lite0', 'lite1', 'lite2', 'lite3', 'lite4'])
def test_parameter_counts_are_the_published_ones(config, published):
  model = nnx.eval_shape(lambda: efficientnet.EfficientNet(config, nnx.Rngs(0)))
  assert round(sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6, 1) == published
  assert len(model.blocks) == config.layers


def test_blocks_are_a_chain(model):
  x = nnx.relu6(model.stem(IMAGES))
  for block in model.blocks:
    x = block(x)
  x = nnx.relu6(model.top(x)).mean((1, 2))
  np.testing.assert_allclose(model.head(x), forward(model, IMAGES), atol=1e-5)
  assert isinstance(model.blocks, nnx.List)


def test_every_norm_folds(model):
  folded = qat.fold_batch_norm(model, IMAGES)
  assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
  assert type(folded.blocks[1].depthwise.norm) is batch_norm.Identity
  y = forward(model, IMAGES)
  np.testing.assert_allclose(forward(folded, IMAGES), y, atol=1e-5 * np.abs(y).max())
  quantized = qat.quantize(folded, recipes.get('w8a8'))
  np.testing.assert_array_equal(forward(quantized, IMAGES), forward(qat.freeze(quantized), IMAGES))


def test_training_normalizes_by_the_batch():
  model = build()
  before = np.asarray(model.stem.norm.mean[...])
  model.train()
  forward(model, IMAGES)
  assert (np.asarray(model.stem.norm.mean[...]) != before).all()


def test_images_have_colours_last(model):
  with pytest.raises(ValueError, match=r'shape \(17, 18, 3\): it takes images \[b, h, w, 3\]\. Add the axis'):
    model(IMAGES[0])
  with pytest.raises(ValueError, match=r'shape \(2, 3, 17, 18\).*put the colours last'):
    model(IMAGES.transpose(0, 3, 1, 2))


def test_layers_compute_in_the_dtype_asked_for():
  model = efficientnet.EfficientNet(TINY, nnx.Rngs(0), jnp.bfloat16)
  assert nnx.eval_shape(forward, model, IMAGES).dtype == jnp.bfloat16
