"""Labelled images that are read, augmented and normalized as they are drawn.

    source = Images(records, view, classes=1000, training=Training(augment=(...), mixing=mixing.Mixing(mixup=0.2)))
    source.take(indices)                      # as evaluation sees them
    source.draw(indices, positions, seed)     # as training does, data.batches calls it

Both give {'image': f32[b, size, size, 3], 'label': i32[b], 'targets': f32[b, classes]}. What is drawn for an example
depends on the seed and on its position in the endless row of epochs alone, so that a run that goes on sees the same
pixels, and so do many machines that read parts of a batch.
"""

from concurrent import futures
import dataclasses
import functools
import io
import os

import numpy as np
from PIL import Image

from qat.run import mixing as mixings

# Means and deviations of the colours over the training sets, of 0..1, as published networks were trained.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# Third words of seeds, so that no two uses draw the same numbers.
EXAMPLE, PAIR = 1, 2


@dataclasses.dataclass(frozen=True)
class Training:
  """What is done to images in training.

  Attributes:
    augment: transforms of augment.py, in order; none leaves the view of evaluation.
    mixing: of pairs.
    smoothing: of labels.
  """
  augment: tuple = ()
  mixing: mixings.Mixing = dataclasses.field(default_factory=mixings.Mixing)
  smoothing: float = 0.0


PLAIN = Training()


class Images:
  """A source of images (sources.py says what that is)."""

  threads = 2  # That read batches ahead; the images of a batch are shared out among all cores.

  def __init__(self, records, view, classes, colours=IMAGENET, training=PLAIN):
    """Reads nothing yet.

    Args:
      records: has a length, and `read(indices)`: [(content, label)], a content being bytes or the path of a file that
        PIL reads, or u8[h, w, 3].
      view: how evaluation sees an image, a transform of augment.py.
      classes: how many labels there are.
      colours: (means, deviations) of the three, of 0..1.
      training: what is done to what is drawn.
    """
    self.records, self.view, self.classes, self.training = records, view, classes, training
    self.mean, self.deviation = (np.array(x, np.float32)[None, None] for x in colours)

  def __len__(self):
    return len(self.records)

  def take(self, indices):
    """Gathers i64[b] examples as evaluation sees them."""
    return self._batch(indices, [self.view] * len(indices), 0.0)

  def draw(self, indices, positions, seed):
    """Gathers i64[b] examples at i64[b] positions of the epochs, augmented."""
    mixing = self.training.mixing
    if mixing and (len(indices) % 2 or np.any(positions[0::2] % 2) or np.any(positions[1::2] != positions[::2] + 1)):
      raise ValueError(f'Mixup and cutmix mix examples 2 i and 2 i + 1, and {len(indices)} are read from '
                       f'{positions[0]} on. Give a data.batch_size of which every machine reads an even part.')
    if not self.training.augment:
      views = [self.view] * len(indices)
    else:
      views = [functools.partial(self._augmented, np.random.default_rng((seed, int(p), EXAMPLE))) for p in positions]
    batch = self._batch(indices, views, self.training.smoothing)
    for i in range(0, len(indices) if mixing else 0, 2):
      random, pair = np.random.default_rng((seed, int(positions[i]), PAIR)), slice(i, i + 2)
      batch['image'][pair], batch['targets'][pair] = mixing(batch['image'][pair], batch['targets'][pair], random)
    return batch

  def _augmented(self, random, image):
    for transform in self.training.augment:
      image = transform(image, random)
    return image

  def _batch(self, indices, views, smoothing):
    contents, labels = zip(*self.records.read(indices))
    images = list(_pool().map(self._pixels, contents, views))
    labels = np.array(labels, np.int32)
    return {'image': np.stack(images), 'label': labels, 'targets': mixings.smoothed(labels, self.classes, smoothing)}

  def _pixels(self, content, view):
    """f32[h, w, 3]."""
    pixels = np.asarray(view(opened(content)), np.float32) / np.float32(255)
    return (pixels - self.mean) / self.deviation


def opened(content):
  """A PIL.Image in RGB of bytes, the path of a file, or u8[h, w, 3]."""
  if isinstance(content, np.ndarray):
    return Image.fromarray(content)
  try:
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
      return image.convert('RGB')
  except OSError as error:
    where = content if isinstance(content, str) else f'{len(content)} bytes of the dataset'
    raise ValueError(f'{where}: it is no whole image ({error}). Get the file anew.') from error


@functools.cache
def _pool():
  """Threads that decode: PIL lets others run meanwhile."""
  return futures.ThreadPoolExecutor(os.cpu_count(), 'images')
