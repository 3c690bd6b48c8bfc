"""8x8 handwritten digits, 1,797 real images that come with scikit-learn: the dataset that needs no network.

Alpaydin and Kaynak. Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
https://archive.ics.uci.edu/dataset/80
"""

import numpy as np
import tensorflow_datasets as tfds

from qat.run import prepared
from qat.run import sources

TEST_EXAMPLES = 500
HIGHEST = 16  # a pixel counts the dark cells of a 4x4 square


class Digits(tfds.core.GeneratorBasedBuilder):
  """Splits: test is the first 500 of np.random.default_rng(123).permutation(1797), train the other 1,297."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
        'label': tfds.features.ClassLabel(num_classes=10)}))

  def _split_generators(self, dl_manager):
    from sklearn import datasets  # here, for it takes a second to import and is needed once
    digits = datasets.load_digits()
    order = np.random.default_rng(123).permutation(len(digits.target))
    images = digits.images.astype(np.uint8)[..., None]  # f64[n, 8, 8] of whole numbers -> u8[n, 8, 8, 1]
    select = lambda which: zip(images[which], digits.target[which])
    return {
        'train': self._generate_examples(select(order[TEST_EXAMPLES:])),
        'test': self._generate_examples(select(order[:TEST_EXAMPLES]))}

  def _generate_examples(self, examples):
    for i, (image, label) in enumerate(examples):
      yield i, {'image': image, 'label': int(label)}


def load(split):
  """The source of a split: image f32[b, 8, 8, 1] in 0..1, label i32[b]."""
  data_source = prepared.read(prepared.generate(Digits), split)
  return sources.Records(data_source, ('image', 'label'), sources.images(HIGHEST)).copy()
