"""Residual networks for ImageNet, 18 to 101 layers, and for CIFAR, 20 to 110.

He et al. Deep Residual Learning for Image Recognition, CVPR 2016. https://arxiv.org/abs/1512.03385

Differences from the paper: a bottleneck strides in its 3x3 convolution, as in torchvision's published networks and not
in its first 1x1; where a shortcut of CIFAR's networks changes its shape it is a 1x1 convolution (option B) and not
padding (option A).

Paddings are symmetric, as in the published networks. `model.train()` normalizes by the batch, `model.eval()` by running
averages.
"""

import dataclasses
import functools

from flax import nnx
import jax.numpy as jnp

BATCH_NORM = dict(momentum=0.9, epsilon=1e-5)
HE = nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # He et al. ICCV 2015, Eq. (14).


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions (Fig. 5, left)."""

  EXPANSION = 1

  def __init__(self, inputs, width, stride, conv, norm):
    self.conv1, self.norm1 = conv(inputs, width, 3, stride), norm(width)
    self.conv2, self.norm2 = conv(width, width, 3), norm(width)
    self.shortcut = Shortcut(inputs, width, stride, conv, norm)

  def __call__(self, x):
    """f32[b, h, w, inputs] -> f32[b, h / stride, w / stride, width]."""
    y = nnx.relu(self.norm1(self.conv1(x)))
    return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nnx.Module):
  """1x1 to fewer channels, 3x3, 1x1 to four times as many (Fig. 5, right)."""

  EXPANSION = 4

  def __init__(self, inputs, width, stride, conv, norm):
    outputs = self.EXPANSION * width
    self.conv1, self.norm1 = conv(inputs, width, 1), norm(width)
    self.conv2, self.norm2 = conv(width, width, 3, stride), norm(width)
    self.conv3, self.norm3 = conv(width, outputs, 1), norm(outputs)
    self.shortcut = Shortcut(inputs, outputs, stride, conv, norm)

  def __call__(self, x):
    """f32[b, h, w, inputs] -> f32[b, h / stride, w / stride, 4 width]."""
    y = nnx.relu(self.norm1(self.conv1(x)))  # [b, h, w, width]
    y = nnx.relu(self.norm2(self.conv2(y)))  # [b, h / stride, w / stride, width]
    return nnx.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class Shortcut(nnx.Module):
  """The input, by a 1x1 convolution where its shape would differ."""

  def __init__(self, inputs, outputs, stride, conv, norm):
    same = inputs == outputs and stride == 1
    self.conv, self.norm = (None, None) if same else (conv(inputs, outputs, 1, stride), norm(outputs))

  def __call__(self, x):
    return x if self.conv is None else self.norm(self.conv(x))


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of a network.

  Attributes:
    block: BasicBlock or Bottleneck.
    depths: blocks of each stage; each stage but the first halves the image.
    widths: channels of each stage, before a Bottleneck's expansion.
    classes: how many scores the head puts out.
    large: whether images are: a 7x7 convolution and a pooling quarter them first, in the place of one 3x3.
  """
  block: type[nnx.Module]
  depths: tuple[int, ...]
  widths: tuple[int, ...] = (64, 128, 256, 512)
  classes: int = 1000
  large: bool = True


class ResNet(nnx.Module):
  """A stem, stages of residual blocks, a head over the mean of all places."""

  def __init__(self, config, rngs, dtype=None):
    """Builds the blocks.

    Args:
      config: sizes.
      rngs: where the initial weights come from.
      dtype: what the layers compute in; that of the input and weights if not given.
    """
    norm = functools.partial(nnx.BatchNorm, **BATCH_NORM, dtype=dtype, rngs=rngs)

    def conv(inputs, outputs, kernel, stride=1):
      return nnx.Conv(inputs, outputs, (kernel, kernel), stride, padding=2 * ((kernel // 2, kernel // 2),),
                      use_bias=False, kernel_init=HE, dtype=dtype, rngs=rngs)

    self.config = config
    width = config.widths[0]
    self.stem = conv(3, width, 7, 2) if config.large else conv(3, width, 3)
    self.norm, self.blocks = norm(width), nnx.List()
    for stage, (depth, wide) in enumerate(zip(config.depths, config.widths, strict=True)):
      for i in range(depth):
        stride = 2 if stage and not i else 1
        self.blocks.append(config.block(width, wide, stride, conv, norm))
        width = wide * config.block.EXPANSION
    self.head = nnx.Linear(width, config.classes, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    """Scores the classes: f32[b, h, w, 3] -> f32[b, classes]."""
    if x.ndim != 4 or x.shape[-1] != 3:
      raise ValueError(f'ResNet called on an array of shape {x.shape}: it takes images [b, h, w, 3]. '
                       'Add the axis of the batch, or put the colours last.')
    x = nnx.relu(self.norm(self.stem(x)))                            # [b, h / 2, w / 2, c]
    if self.config.large:
      x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # [b, h / 4, w / 4, c]
    for block in self.blocks:
      x = block(x)
    return self.head(jnp.mean(x, (1, 2)))                            # [b, classes]


def _large(block, *depths):
  def make(rngs, *, classes=1000, dtype=None):
    return ResNet(Config(block, depths, classes=classes), rngs, dtype)
  return make


def cifar(rngs, *, layers=20, width=16, classes=10, dtype=None):
  """The network of Sec. 4.2 with 6 n + 2 layers: 20, 32, 44, 56 or 110.

  >>> import jax
  >>> sum(p.size for p in jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(cifar(nnx.Rngs(0)), nnx.Param))))
  272474
  """
  if layers < 8 or (layers - 2) % 6:
    raise ValueError(f'resnet.cifar of {layers} layers: there are 6 n + 2 of them. Choose 20, 32, 44, 56 or 110.')
  depths, widths = 3 * ((layers - 2) // 6,), (width, 2 * width, 4 * width)
  return ResNet(Config(BasicBlock, depths, widths, classes, large=False), rngs, dtype)


resnet18, resnet34 = _large(BasicBlock, 2, 2, 2, 2), _large(BasicBlock, 3, 4, 6, 3)
resnet50, resnet101 = _large(Bottleneck, 3, 4, 6, 3), _large(Bottleneck, 3, 4, 23, 3)
