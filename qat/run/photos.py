"""Photos for networks that were trained on ImageNet: 20 with labels, and crops of others without.

    foolbox        20 photos of ImageNet's validation set, 512 x 512 but for one, each with its class
    scikit-image   19 photos of its `data` folder (its other images are drawings and patterns): 9 in colour, 10 grey
    scikit-learn   its two sample images, a temple and a flower

No class is known of the last two. `calibration` crops those, and `held_out` the 20 of foolbox, so that what is
measured was never calibrated on. Crops of one photo are alike: their number is not that of independent images. The
photos keep their own terms, and are read where they were published.
"""

import io
import math
import pathlib
import re
import zipfile

import numpy as np
from PIL import Image
import sklearn.datasets

from qat.run import packages

# The published EfficientNet-Lite: (x - 127) / 128, and 32 pixels around the crop of an image resized with them.
MEAN, SCALE = 127.0, 128.0
MARGIN = 32
SCIKIT_IMAGE = (
    'astronaut.png', 'chelsea.png', 'coffee.png', 'hubble_deep_field.jpg', 'ihc.png', 'motorcycle_left.png',
    'motorcycle_right.png', 'retina.jpg', 'rocket.jpg', 'brick.png', 'camera.png', 'cell.png', 'clock_motion.png',
    'coins.png', 'grass.png', 'gravel.png', 'moon.png', 'page.png', 'text.png')
# Random crops as in Szegedy et al. Going Deeper with Convolutions, CVPR 2015, Sec. 6, from a quarter of the area on.
AREA, ASPECT = (0.25, 1.0), (3 / 4, 4 / 3)


def imagenet(size=224):
  """The 20 labelled photos, cropped at their centres.

  Args:
    size: of the images, which are square.

  Returns:
    f32[20, size, size, 3] of (x - 127) / 128, and i32[20], the classes 0..999 in the order of ILSVRC 2012.
  """
  photos, labels = _foolbox()
  return np.stack([centre(photo, size) for photo in photos]), np.array(labels, np.int32)


def calibration(count, seed, size=224):
  """Random crops and flips of the 21 photos of scikit-image and scikit-learn: f32[count, size, size, 3].

  The photos take turns. The same seed gives the same crops, and a larger count begins with those of a smaller one.
  """
  return crops(_scikit(), count, seed, size)


def held_out(count, seed, size=224):
  """Random crops and flips of the 20 labelled photos, which calibration never sees: f32[count, size, size, 3]."""
  return crops(_foolbox()[0], count, seed, size)


def centre(photo, size):
  """The square at the centre, size / (size + 32) of the shorter side, resized.

  Args:
    photo: PIL.Image in RGB.

  Returns:
    f32[size, size, 3] of (x - 127) / 128.
  """
  side = int(size / (size + MARGIN) * min(photo.size))
  left, top = ((n - side + 1) // 2 for n in photo.size)
  return _resized(photo, (left, top, left + side, top + side), size)


def crops(photos, count, seed, size):
  """Random crops and flips: `count` of them, photo after photo, then from the first again.

  Args:
    photos: list of PIL.Image in RGB.
    count, size: i, how many, and of what size.
    seed: of the random numbers, i.

  Returns:
    f32[count, size, size, 3] of (x - 127) / 128.
  """
  if count < 1 or size < 1:
    raise ValueError(f'{count} crops of size {size}: both are at least 1. Ask for some.')
  random = np.random.default_rng(seed)
  return np.stack([_crop(photos[i % len(photos)], random, size) for i in range(count)])


def _crop(photo, random, size):
  """One crop: a share of the area and an aspect, each drawn; then a place, and whether it is flipped."""
  area = random.uniform(*AREA) * photo.width * photo.height
  aspect = math.exp(random.uniform(*np.log(ASPECT)))
  width, height = min(photo.width, math.sqrt(area * aspect)), min(photo.height, math.sqrt(area / aspect))
  left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
  x = _resized(photo, (left, top, left + width, top + height), size)
  return x[:, ::-1] if random.random() < 0.5 else x


def _resized(photo, box, size):
  """A part of a photo, by bicubic interpolation: f32[size, size, 3] of (x - 127) / 128."""
  pixels = np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC, box), np.float32)
  return (pixels - np.float32(MEAN)) / np.float32(SCALE)


def _foolbox():
  """(photos, their classes), in the order of their names, foolbox/data/imagenet_{place}_{class}.jpg."""
  path = packages.fetch('foolbox')
  with zipfile.ZipFile(path) as archive:
    names = sorted(name for name in archive.namelist() if re.fullmatch(r'foolbox/data/imagenet_\d+_\d+\.jpg', name))
    photos = [_open(archive.read(name)) for name in names]
  if not photos:
    raise ValueError(f'{path}: it has no foolbox/data/imagenet_*.jpg. Get the version named in qat/run/packages.py.')
  return photos, [int(pathlib.PurePath(name).stem.split('_')[2]) for name in names]


def _scikit():
  """The photos of scikit-image and scikit-learn."""
  photos = [_open(packages.read('scikit-image', f'skimage/data/{name}')) for name in SCIKIT_IMAGE]
  return photos + [Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images]


def _open(content):
  return Image.open(io.BytesIO(content)).convert('RGB')
