"""ImageNet and CIFAR-10, from prepared TFDS datasets or from the files that are published.

    imagenet2012   a TFDS dataset; or <data_dir>/{train,val}/<class>/*.JPEG
    cifar10        a TFDS dataset; or <data_dir>/cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin

Russakovsky et al. ImageNet Large Scale Visual Recognition Challenge, 2015. https://arxiv.org/abs/1409.0575
Krizhevsky. Learning Multiple Layers of Features from Tiny Images, 2009.
https://www.cs.toronto.edu/~kriz/cifar.html

Nothing is fetched: an error says what to type.
"""

import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from qat.run import augment as augments
from qat.run import images
from qat.run import mixing
from qat.run import prepared
from qat.run import splits

ENDINGS = ('.jpeg', '.jpg', '.png')
FOLDERS = dict(validation=('validation', 'val'))  # By other names than TFDS's.
CIFAR_TRAIN, CIFAR_TEST = tuple(f'data_batch_{i}.bin' for i in range(1, 6)), ('test_batch.bin',)
CIFAR_RECORD = 1 + 3 * 32 * 32  # Bytes: the label; red, green and blue, row by row.

GET_IMAGENET = (
    'Get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download, which asks for an '
    'account, into a folder TARS. Then, where TensorFlow is installed, type `tfds build imagenet2012 '
    '--file_format=array_record --manual_dir=TARS --data_dir={folder}`; or unpack them to '
    '{folder}/train/<class>/*.JPEG and {folder}/val/<class>/*.JPEG. Give the folder as '
    '--config.data.data_dir={folder}.')
GET_CIFAR = (
    'Type `curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz && mkdir -p {folder} && tar -xzf '
    'cifar-10-binary.tar.gz -C {folder}`; or, where TensorFlow is installed, `tfds build cifar10 '
    '--file_format=array_record --data_dir={folder}`. Give the folder as --config.data.data_dir={folder}.')


def imagenet2012(split, data_dir=None, size=224, resize=256, augment=(), mixup=0.0, cutmix=0.0, smoothing=0.0):
  """A source of ImageNet: images.Images.

  Args:
    split: 'train', 'validation', or a slice.
    data_dir: the folder that has it; that of TFDS if None.
    size: of images, after augmentation and in evaluation.
    resize: of the shorter side in evaluation, before the centre is cropped.
    augment: of training: transforms of augment.py by name, {'name': ..., option: ...}.
    mixup, cutmix: of training, see mixing.Mixing.
    smoothing: of the labels in training.
  """
  records, classes = _records('imagenet2012', split, data_dir, _class_folders, GET_IMAGENET)
  return images.Images(records, augments.CentreCrop(size, resize), classes, images.IMAGENET,
                       images.Training(augments.resolve(augment, size), mixing.Mixing(mixup, cutmix), smoothing))


def cifar10(split, data_dir=None, augment=(), mixup=0.0, cutmix=0.0, smoothing=0.0):
  """A source of CIFAR-10: images.Images of 32 x 32. The splits are 'train' and 'test'; options as above."""
  records, classes = _records('cifar10', split, data_dir, _cifar_batches, GET_CIFAR)
  return images.Images(records, augments.Whole(32), classes, images.CIFAR10,
                       images.Training(augments.resolve(augment, 32), mixing.Mixing(mixup, cutmix), smoothing))


def _records(name, split, data_dir, from_files, get):
  """(what reads contents and labels, classes) of whichever is in the folder."""
  if builder := prepared.found(name, data_dir):
    source = prepared.read(builder, split, decoders={'image': tfds.decode.SkipDecoding()})
    return Prepared(source), builder.info.features['label'].num_classes
  folder = pathlib.Path(data_dir or prepared.folder()).expanduser()
  if found := from_files(folder, split):
    return found
  there = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else 'nothing'
  raise ValueError(f'Dataset {name!r}: it is not in {folder}, where there is {there}. {get.format(folder=folder)}')


class Prepared:
  """Encoded images of a TFDS data source."""

  def __init__(self, data_source):
    self.data_source = data_source

  def __len__(self):
    return len(self.data_source)

  def read(self, indices):
    """[(bytes, label)] of i64[b] examples."""
    return [(e['image'], e['label']) for e in self.data_source.__getitems__([int(i) for i in indices])]


class Listed:
  """Contents, or paths of files, that are listed with their labels."""

  def __init__(self, contents, labels):
    self.contents, self.labels = contents, labels

  def __len__(self):
    return len(self.labels)

  def read(self, indices):
    """[(content, label)] of i64[b] examples."""
    return [(self.contents[i], self.labels[i]) for i in indices]


def _class_folders(folder, split):
  """(Listed, classes) of <split>/<class>/*.JPEG, in the order of names; None where there are no such folders."""
  train = folder / 'train'
  if not train.is_dir():
    return None
  classes = sorted(p.name for p in train.iterdir() if p.is_dir())
  files = {}
  for name in splits.names(split):
    place = next((p for p in (folder / n for n in FOLDERS.get(name, (name,))) if p.is_dir()), None)
    if place:
      files[name] = _files(place, classes)
  parts = splits.ranges(split, {name: len(found) for name, found in files.items()})
  chosen = [pair for name, first, end in parts for pair in files[name][first:end]]
  return Listed(*zip(*chosen)), len(classes)


def _files(place, classes):
  """[(path, label)] of the images of a split."""
  places = sorted(p.name for p in place.iterdir() if p.is_dir())
  if unknown := sorted(set(places) - set(classes)):
    raise ValueError(f'{place}: it has the classes {unknown[:4]}, which {place.parent / "train"} does not have. The '
                     'folders of a class have one name in all splits.')
  labels = {name: label for label, name in enumerate(classes)}
  found = [(path, labels[name]) for name in places
           for path in sorted(entry.path for entry in os.scandir(place / name)) if path.lower().endswith(ENDINGS)]
  if not found:
    raise ValueError(f'{place}: its folders {places[:4]} hold no files that end in {ENDINGS}. Unpack the images of '
                     'each class into a folder of its own.')
  return found


def _cifar_batches(folder, split):
  """(Listed, 10) of the binary version; None where it is not."""
  folder = folder / 'cifar-10-batches-bin' if (folder / 'cifar-10-batches-bin').is_dir() else folder
  files = {name: [folder / n for n in names] for name, names in dict(train=CIFAR_TRAIN, test=CIFAR_TEST).items()}
  if not any(path.is_file() for paths in files.values() for path in paths):
    return None
  read = {name: np.concatenate([_cifar(path) for path in files[name]]) for name in splits.names(split) if name in files}
  parts = splits.ranges(split, {name: len(rows) for name, rows in read.items()})
  rows = np.concatenate([read[name][first:end] for name, first, end in parts])
  pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [n, 32, 32, 3]
  return Listed(np.ascontiguousarray(pixels), rows[:, 0].astype(np.int32)), 10


def _cifar(path):
  """The records of a batch: u8[n, 3073]."""
  content = np.frombuffer(path.read_bytes(), np.uint8)
  if not len(content) or len(content) % CIFAR_RECORD or content[::CIFAR_RECORD].max() > 9:
    raise ValueError(f'{path}: its {len(content)} bytes are no records of {CIFAR_RECORD}, the first of which is a '
                     'label of 0 to 9. Get the binary version of CIFAR-10 anew.')
  return content.reshape(-1, CIFAR_RECORD)
