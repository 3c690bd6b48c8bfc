"""Augmentation: transforms of one image by its own random numbers, named by `data.train_options.augment`, in order.

    augment=(dict(name='random_resized_crop'), dict(name='flip'), dict(name='rand_augment', magnitude=9))

A transform is a value, and a function (PIL.Image in RGB, np.random.Generator) -> PIL.Image. How an image is seen in
evaluation is one as well, and draws nothing.
"""

import dataclasses
import math

from PIL import Image

from qat.run import names
from qat.run import rand_augment

BILINEAR = Image.Resampling.BILINEAR  # PIL's is anti-aliased: it averages what a smaller image leaves out.
ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A part of random area and aspect, resized. Szegedy et al. CVPR 2015, Sec. 6. https://arxiv.org/abs/1409.4842

  Attributes:
    size: of the result, a square.
    area: bounds of the part's share of the image.
    aspect: bounds of its width over its height, whose logarithm is uniform.
  """
  size: int
  area: tuple = (0.08, 1.0)
  aspect: tuple = (3 / 4, 4 / 3)

  def __call__(self, image, random):
    return image.resize((self.size, self.size), BILINEAR, self.box(image, random))

  def box(self, image, random):
    """(left, top, right, bottom); of what fits the aspects at the centre, where no draw fits the image."""
    w, h = image.size
    for _ in range(ATTEMPTS):
      area = w * h * random.uniform(*self.area)
      aspect = math.exp(random.uniform(*map(math.log, self.aspect)))
      width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if 0 < width <= w and 0 < height <= h:
        left, top = random.integers(w - width + 1), random.integers(h - height + 1)
        return int(left), int(top), int(left) + width, int(top) + height
    width, height = min(w, round(h * self.aspect[1])), min(h, round(w / self.aspect[0]))
    left, top = (w - width) // 2, (h - height) // 2
    return left, top, left + width, top + height


@dataclasses.dataclass(frozen=True)
class PaddedCrop:
  """A part of `size`, of the image amid `padding` black pixels. He et al. CVPR 2016, Sec. 4.2: CIFAR.

  https://arxiv.org/abs/1512.03385
  """
  size: int
  padding: int = 4

  def __call__(self, image, random):
    p = self.padding
    if min(image.size) + 2 * p < self.size:
      raise ValueError(f'PaddedCrop of {self.size} pixels, {p} around: an image has {image.size}. Take less.')
    left, top = (int(random.integers(n + 2 * p - self.size + 1)) - p for n in image.size)
    return image.crop((left, top, left + self.size, top + self.size))


@dataclasses.dataclass(frozen=True)
class Flip:
  """Left and right exchanged, by chance."""
  probability: float = 0.5

  def __call__(self, image, random):
    flips = random.random() < self.probability
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips else image


@dataclasses.dataclass(frozen=True)
class CentreCrop:
  """How images are seen in evaluation: the shorter side resized to `resize`, and a square of `size` at the centre."""
  size: int
  resize: int

  def __call__(self, image, random=None):
    scale = self.resize / min(image.size)
    image = image.resize(tuple(max(self.resize, round(n * scale)) for n in image.size), BILINEAR)
    left, top = ((n - self.size) // 2 for n in image.size)
    return image.crop((left, top, left + self.size, top + self.size))


@dataclasses.dataclass(frozen=True)
class Whole:
  """Images of one size as they are."""
  size: int

  def __call__(self, image, random=None):
    if image.size != (self.size, self.size):
      raise ValueError(f'An image of {image.size} pixels: those of the set are {self.size} x {self.size}. Resize it.')
    return image


TRANSFORMS = dict(random_resized_crop=RandomResizedCrop, padded_crop=PaddedCrop, flip=Flip,
                  rand_augment=rand_augment.RandAugment)


def resolve(settings, size):
  """The transforms of `augment`, a list of dict(name=..., option=...); those that have a size get `size`."""
  made = []
  for given in settings:
    given = dict(given)
    name = given.pop('name', None)
    if name not in TRANSFORMS:
      raise ValueError(f'augment {name!r}: there is no transform of that name. {names.suggest(name, TRANSFORMS)}')
    fields = [field.name for field in dataclasses.fields(TRANSFORMS[name])]
    if wrong := sorted(set(given) - set(fields)):
      raise ValueError(f'augment {name!r} has no {wrong}: its options are {fields}. Leave out the others.')
    made.append(TRANSFORMS[name](**(dict(size=size) if 'size' in fields else {}) | given))
  return tuple(made)
