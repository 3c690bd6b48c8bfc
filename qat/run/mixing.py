"""Mixup and CutMix: two images, and what they are images of, become two mixtures.

Zhang et al. mixup: Beyond Empirical Risk Minimization, ICLR 2018. https://arxiv.org/abs/1710.09412
Yun et al. CutMix: Regularization Strategy to Train Strong Classifiers, ICCV 2019. https://arxiv.org/abs/1905.04899
Szegedy et al. Rethinking the Inception Architecture, CVPR 2016, Sec. 7: label smoothing. https://arxiv.org/abs/1512.00567

Differences from the papers: examples 2i and 2i + 1 of an epoch are mixed with each other, by a share of their own, and
not a batch with its permutation by one share: so a mixture does not depend on which machine reads which rows. Of both,
one is drawn for each pair.
"""

import dataclasses
import math

import numpy as np


def mixup(x, y, share):
  """x~ = share x_i + (1 - share) x_j, and the same of y: [2, ...] each, of the pair both ways."""
  share = np.float32(share)
  return tuple(share * a + (1 - share) * a[::-1] for a in (x, y))


def cutmix(x, y, share, centre):
  """Puts a part of each image in the place of that of the other.

  Args:
    x: f32[2, h, w, c].
    y: f32[2, classes].
    share: lambda of the paper: what is left of an image, were all of the part inside.
    centre: (row, column) of the part, from 0 to 1 of the image.

  Returns:
    x and y, whose mixture is that of the areas.
  """
  h, w = x.shape[1:3]
  spans = []
  for n, at in zip((h, w), centre):
    half, middle = int(n * math.sqrt(1 - share)) // 2, int(at * n)
    spans.append(slice(max(middle - half, 0), min(middle + half, n)))
  rows, columns = spans
  mixed = x.copy()
  mixed[:, rows, columns] = x[::-1, rows, columns]
  left = np.float32(1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (h * w))
  return mixed, left * y + (1 - left) * y[::-1]


def smoothed(labels, classes, smoothing):
  """(1 - smoothing) of the label and smoothing / classes of all: i32[b] -> f32[b, classes]."""
  one_hot = np.eye(classes, dtype=np.float32)[labels]
  return np.float32(1 - smoothing) * one_hot + np.float32(smoothing / classes)


@dataclasses.dataclass(frozen=True)
class Mixing:
  """What happens to pairs.

  Attributes:
    mixup, cutmix: alpha of Beta(alpha, alpha), which the share is drawn from; 0 leaves it out.
  """
  mixup: float = 0.0
  cutmix: float = 0.0

  def __post_init__(self):
    if min(self.mixup, self.cutmix) < 0:
      raise ValueError(f'{self}: alpha of Beta(alpha, alpha) is above 0, and 0 leaves it out. Choose from these.')

  def __bool__(self):
    return bool(self.mixup or self.cutmix)

  def __call__(self, x, y, random):
    """A pair f32[2, h, w, c], f32[2, classes], mixed."""
    cuts = self.cutmix and (not self.mixup or random.random() < 0.5)
    share = random.beta(*2 * [self.cutmix if cuts else self.mixup])
    return cutmix(x, y, share, random.random(2)) if cuts else mixup(x, y, share)
