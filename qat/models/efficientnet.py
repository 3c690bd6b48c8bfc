"""EfficientNet-Lite: networks of inverted bottlenecks that were made to be quantized.

Tan and Le. EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019.
https://arxiv.org/abs/1905.11946
Sandler et al. MobileNetV2, CVPR 2018, Fig. 4, for the block. https://arxiv.org/abs/1801.04381
The Lite form: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite

Differences of the Lite form from the paper: no squeeze-and-excitation; relu6 in place of swish; stem and head keep
their widths, and the first and the last stage their one block, whatever the scale.
Differences of this file from it: no dropout and no stochastic depth; layers start from Flax's variances.
"""

import dataclasses
import functools
import math

from flax import nnx

from qat.models import convolve


@dataclasses.dataclass(frozen=True)
class Stage:
  """Blocks of one width: the first of them has the stride."""

  layers: int
  kernel: int
  stride: int
  expansion: int
  width: int


# Table 1 of the paper, stages 2 to 8.
B0 = (
    Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 6, 24), Stage(2, 5, 2, 6, 40), Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112), Stage(4, 5, 2, 6, 192), Stage(1, 3, 1, 6, 320))
STEM_WIDTH, HEAD_WIDTH = 32, 1280
# As the published weights were trained.
BATCH_NORM = dict(momentum=0.99, epsilon=1e-3)


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of a network.

  Attributes:
    stages: of the blocks.
    image_size: h and w of the images that it was made for; it takes any.
  """

  stages: tuple[Stage, ...]
  image_size: int
  stem_width: int = STEM_WIDTH
  head_width: int = HEAD_WIDTH
  classes: int = 1000

  layers = property(lambda self: sum(stage.layers for stage in self.stages))


def scaled(width, depth, image_size):
  """B0 with wider and deeper stages (Sec. 3.3); widths are multiples of 8, and fall by 10 % at most.

  >>> [stage.width for stage in scaled(1.4, 1.8, 300).stages]
  [24, 32, 56, 112, 160, 272, 448]
  """
  def widened(n):
    near = max(8, int(n * width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * n * width else near

  depths = [1, *(math.ceil(stage.layers * depth) for stage in B0[1:-1]), 1]
  stages = (dataclasses.replace(s, width=widened(s.width), layers=layers) for s, layers in zip(B0, depths))
  return Config(tuple(stages), image_size)


LITE0, LITE1 = scaled(1.0, 1.0, 224), scaled(1.0, 1.1, 240)
LITE2, LITE3, LITE4 = scaled(1.1, 1.2, 260), scaled(1.2, 1.4, 280), scaled(1.4, 1.8, 300)


class ConvNorm(nnx.Module):
  """A convolution and its BatchNorm."""

  def __init__(self, inputs, outputs, kernel, stride=1, groups=1, *, rngs, dtype=None):
    self.conv = nnx.Conv(inputs, outputs, (kernel, kernel), stride, feature_group_count=groups, use_bias=False,
                         conv_general_dilated=convolve.convolve, dtype=dtype, rngs=rngs)
    self.norm = nnx.BatchNorm(outputs, **BATCH_NORM, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    """f32[b, h, w, inputs] -> f32[b, h / stride, w / stride, outputs], rounded up."""
    return self.norm(self.conv(x))


class Block(nnx.Module):
  """The inverted bottleneck: widen, filter each channel by itself, narrow; added to its input if that has its shape."""

  def __init__(self, inputs, outputs, kernel, stride, expansion, layer):
    inner = inputs * expansion
    self.expand = layer(inputs, inner, 1) if expansion > 1 else None
    self.depthwise = layer(inner, inner, kernel, stride, groups=inner)
    self.project = layer(inner, outputs, 1)
    self.residual = stride == 1 and inputs == outputs

  def __call__(self, x):
    """f32[b, h, w, inputs] -> f32[b, h / stride, w / stride, outputs], rounded up."""
    y = x if self.expand is None else nnx.relu6(self.expand(x))  # [b, h, w, inner]
    y = nnx.relu6(self.depthwise(y))                             # [b, h / stride, w / stride, inner]
    y = self.project(y)                                          # [b, h / stride, w / stride, outputs]
    return x + y if self.residual else y


class EfficientNet(nnx.Module):
  """A stem, blocks, a head over the mean of all places.

  `model.train()` normalizes by the batch, `model.eval()` by the running averages.
  """

  def __init__(self, config, rngs, dtype=None):
    """Builds the blocks.

    Args:
      config: LITE0 to LITE4, or sizes of your own.
      rngs: where the initial weights come from.
      dtype: what the layers compute in; that of the input and weights if not given.

    >>> config = Config((Stage(2, 3, 2, 6, 8),), image_size=32, stem_width=8, head_width=16, classes=10)
    >>> logits = lambda: EfficientNet(config, nnx.Rngs(0))(nnx.Rngs(1).normal((2, 32, 32, 3)))
    >>> nnx.eval_shape(logits).shape
    (2, 10)
    """
    layer = functools.partial(ConvNorm, rngs=rngs, dtype=dtype)
    self.config = config
    self.stem = layer(3, config.stem_width, 3, 2)
    self.blocks, width = nnx.List(), config.stem_width
    for stage in config.stages:
      for i in range(stage.layers):
        stride = 1 if i else stage.stride
        self.blocks.append(Block(width, stage.width, stage.kernel, stride, stage.expansion, layer))
        width = stage.width
    self.top = layer(width, config.head_width, 1)
    self.head = nnx.Linear(config.head_width, config.classes, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    """Scores the classes: f32[b, h, w, 3] -> f32[b, classes]."""
    if x.ndim != 4 or x.shape[-1] != 3:
      raise ValueError(f'EfficientNet called on an array of shape {x.shape}: it takes images [b, h, w, 3]. '
                       'Add the axis of the batch, or put the colours last.')
    x = nnx.relu6(self.stem(x))         # [b, h / 2, w / 2, stem_width]
    for block in self.blocks:
      x = block(x)
    x = nnx.relu6(self.top(x))          # [b, h / 32, w / 32, head_width]
    return self.head(x.mean((1, 2)))    # [b, classes]
