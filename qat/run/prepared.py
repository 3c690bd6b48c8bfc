"""Prepared TFDS datasets, without TensorFlow.

TensorFlow Datasets reads and writes ArrayRecord files with no TensorFlow installed, and that is all that is
used of it: no tfrecord, no tf.data, and no feature that needs it to encode.
"""

import contextlib
import io
import os
import tempfile

from absl import logging
import numpy as np
import tensorflow_datasets as tfds

from qat.run import packages
from qat.run import sources

# Sets up to this are copied to memory: MNIST is 43 MB, ImageNet 150 GB.
COPIED_BYTES = 1 << 30


def generate(builder_class):
  """Prepares a dataset of our own below the cache, the first time.

  It is written elsewhere and renamed, so that a killed process leaves nothing behind that looks whole, and of
  two processes the later one finds the work done.

  Args:
    builder_class: a tfds.core.GeneratorBasedBuilder.

  Returns:
    The builder of the prepared dataset.
  """
  root = packages.cache() / 'tfds'
  relative = os.path.join(builder_class.name, str(builder_class.VERSION))
  if not (root / relative).exists():
    root.mkdir(exist_ok=True)
    (root / relative).parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix='.') as folder:
      logging.info('Preparing %s in %s', builder_class.name, root / relative)
      tfds.disable_progress_bar()
      with contextlib.redirect_stdout(io.StringIO()):  # TFDS would announce the temporary folder
        builder_class(data_dir=folder, file_format='array_record').download_and_prepare()
      try:
        os.rename(os.path.join(folder, relative), root / relative)
      except OSError:
        if not (root / relative).exists():  # not a second process that was first, but a real failure
          raise
  return tfds.builder_from_directory(root / relative)


def find(name, data_dir):
  """The builder of a dataset that somebody prepared.

  Args:
    name: as TFDS writes it: 'cifar10', 'name/config', 'name:1.0.0'.
    data_dir: where it was prepared; None for TFDS's own folder.
  """
  if builder := found(name, data_dir):
    return builder
  where = data_dir or folder()
  there = sorted(entry.name for entry in os.scandir(where) if entry.is_dir()) if os.path.isdir(where) else []
  raise ValueError(
      f'Dataset {name!r}: it is not prepared in {where}, where there are {there}. Prepare it on a machine that has '
      f'TensorFlow by `tfds build {name} --file_format=array_record --data_dir={where}`, or pass the data_dir '
      'that has it.')


def found(name, data_dir):
  """The builder that `find` finds, or None."""
  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.registered.DatasetNotFoundError:
    return None


def folder():
  """TFDS's own folder of prepared datasets."""
  return os.environ.get('TFDS_DATA_DIR') or tfds.core.constants.DATA_DIR


def read(builder, split, decoders=None):
  """Random access to the examples of a split, 'train' or 'train[:10%]', in the order in which they are stored.

  Args:
    builder: of a prepared dataset.
    split: as above.
    decoders: {feature: how it is read}, as TFDS takes them; images may stay encoded.
  """
  name = builder.name
  try:
    builder.info.splits[split]
  except (KeyError, ValueError) as error:
    raise ValueError(
        f'Split {split!r} of {name}: the splits are {sorted(builder.info.splits)}. '
        "Name one, or a slice of one such as 'train[:10%]'.") from error
  try:
    return builder.as_data_source(split, decoders=decoders)
  except NotImplementedError as error:
    raise ValueError(
        f'Dataset {name} in {builder.data_dir}: it is prepared as {builder.info.file_format.value}, which needs '
        'TensorFlow to read. Prepare it again with `--file_format=array_record`.') from error


def load(builder, split):
  """The source of a prepared dataset that has images and labels, or tokens; copied to memory if it fits."""
  features = builder.info.features
  data_source = read(builder, split)
  if 'tokens' in features:
    records = sources.Records(data_source, ('tokens',), _tokens)
  elif 'image' in features and 'label' in features:
    dtype = np.dtype(features['image'].np_dtype)
    highest = np.iinfo(dtype).max if dtype.kind in 'iu' else 1
    records = sources.Records(data_source, ('image', 'label'), sources.images(highest))
  else:
    raise ValueError(
        f"Dataset {builder.name}: its features are {sorted(features)}. A model is given 'image' and 'label', or "
        "'tokens'. Prepare the dataset with these.")
  shape = features[records.keys[0]].shape
  if None in shape:
    raise ValueError(
        f'Dataset {builder.name}: its {records.keys[0]!r} has shape {shape}, and examples of different shapes make no '
        'batch. Prepare the dataset with one shape.')
  size_bytes = len(records) * np.prod(shape) * np.dtype(features[records.keys[0]].np_dtype).itemsize
  return records.copy() if size_bytes <= COPIED_BYTES else records


def _tokens(batch):
  return {'tokens': batch['tokens'].astype(np.int32)}
