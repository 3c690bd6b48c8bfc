"""RandAugment: a few of fourteen changes of an image, drawn at random, all of one magnitude.

Cubuk et al. RandAugment: Practical automated data augmentation with a reduced search space, 2019.
https://arxiv.org/abs/1909.13719

Differences from the paper: magnitudes go from 0, which changes nothing, to 30 for all operations (Sec. 3.1 has a scale
of 10); the strengths at 30 are those of AutoAugment (https://arxiv.org/abs/1805.09501, Table 6), with positive and
negative changes equally likely. Equalize and AutoContrast have no strength, as there.
"""

import dataclasses

from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps

HIGHEST = 30
FILL = (124, 116, 104)  # What comes in from beyond the edges: the mean colour of ImageNet.
SHEAR = 0.3             # Of the height or width.
TRANSLATE = 150 / 331   # Of the width or height: 150 pixels of AutoAugment's images.
DEGREES = 30
ENHANCE = 0.9           # Factors from 1 - 0.9 to 1 + 0.9.
POSTERIZE_BITS = 4      # Of 8, which are lost.


def _affine(image, matrix):
  return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=FILL)


def _enhanced(kind):
  return lambda image, m: kind(image).enhance(1 + ENHANCE * m)


# Name -> (image, m) -> image, at m from -1 to 1.
SIGNED = dict(
    shear_x=lambda image, m: _affine(image, (1, SHEAR * m, 0, 0, 1, 0)),
    shear_y=lambda image, m: _affine(image, (1, 0, 0, SHEAR * m, 1, 0)),
    translate_x=lambda image, m: _affine(image, (1, 0, round(TRANSLATE * m * image.width), 0, 1, 0)),
    translate_y=lambda image, m: _affine(image, (1, 0, 0, 0, 1, round(TRANSLATE * m * image.height))),
    rotate=lambda image, m: image.rotate(DEGREES * m, Image.Resampling.NEAREST, fillcolor=FILL),
    brightness=_enhanced(ImageEnhance.Brightness), color=_enhanced(ImageEnhance.Color),
    contrast=_enhanced(ImageEnhance.Contrast), sharpness=_enhanced(ImageEnhance.Sharpness))
# The same at m from 0 to 1.
UNSIGNED = dict(
    identity=lambda image, m: image,
    posterize=lambda image, m: ImageOps.posterize(image, 8 - round(POSTERIZE_BITS * m)),
    solarize=lambda image, m: ImageOps.solarize(image, round(256 * (1 - m))),
    auto_contrast=lambda image, m: ImageOps.autocontrast(image),
    equalize=lambda image, m: ImageOps.equalize(image))
OPERATIONS = (*SIGNED, *UNSIGNED)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """Attributes: layers, N of the paper, operations an image; magnitude, M, from 0 to 30."""
  layers: int = 2
  magnitude: float = 9

  def __post_init__(self):
    if not 0 <= self.magnitude <= HIGHEST or self.layers < 0:
      raise ValueError(f'{self}: the magnitude is from 0 to {HIGHEST}, and layers 0 or more. Choose from these.')

  def __call__(self, image, random):
    for _ in range(self.layers):
      name = OPERATIONS[random.integers(len(OPERATIONS))]
      sign = 1 if random.random() < 0.5 else -1
      image = apply(name, image, sign * self.magnitude / HIGHEST)
    return image


def apply(name, image, m):
  """One operation at m from -1 to 1."""
  return SIGNED[name](image, m) if name in SIGNED else UNSIGNED[name](image, abs(m))
