"""Data: a source of examples by name, and batches of it whose position can be saved.

    train = data.load('digits', 'train')
    iterator = data.batches(train, batch_size=64, seed=0)
    batch = next(iterator)                 # {'image': f32[64, 8, 8, 1], 'label': i32[64]}
    position = iterator.get_state()        # a dict that JSON can hold; iterator.set_state(position) goes on there
"""

import inspect
import sys

import grain
import numpy as np

from qat.run import digits
from qat.run import image_sets
from qat.run import mnist
from qat.run import prepared
from qat.run import shakespeare
from qat.run import text_sets

SETS = dict(digits=digits.load, mnist=mnist.load, shakespeare=shakespeare.load)
# Read from data_dir, in the forms in which they are published; never fetched.
FILES = dict(imagenet2012=image_sets.imagenet2012, cifar10=image_sets.cifar10, c4=text_sets.c4,
             wikitext=text_sets.wikitext)


def load(name, split, data_dir=None, **options):
  """Loads a split of a dataset.

  Args:
    name: one of SETS, which come by themselves; one of FILES; or that of any other prepared TFDS dataset:
      'name/config:1.0.0'.
    split: 'train', 'test', or a slice, 'train[:10%]'.
    data_dir: the folder of prepared datasets. Where it is given the dataset is read from it, whatever its name.
    **options: of the set, the arguments of its function: `context_length` and `stride` of shakespeare.

  Returns:
    A source: sources.Arrays, Records or Windows, images.Images, corpus.Corpus.

  >>> len(load('digits', 'train')), len(load('digits', 'test'))
  (1297, 500)
  """
  make = FILES.get(name) or (SETS.get(name) if data_dir is None else None)
  builder = None if make else _prepared(name, data_dir)
  known = set(inspect.signature(make).parameters) - {'split', 'data_dir'} if make else set()
  if not options.keys() <= known:
    raise ValueError(
        f'Options {sorted(options)} of dataset {name!r}: those it has are {sorted(known)}. Leave out the others.')
  if make:
    return make(split, **(dict(data_dir=data_dir) if name in FILES else {}), **options)
  return prepared.load(builder, split)


def _prepared(name, data_dir):
  """The builder of a prepared TFDS dataset."""
  try:
    return prepared.find(name, data_dir)
  except ValueError as error:
    raise ValueError(f'{error} Datasets that need no preparation, if no data_dir is given: {sorted(SETS)}; read from '
                     f'data_dir as they are published: {sorted(FILES)}.') from error


class _Sampler:
  """Batch number i of an endless row of epochs, each in its own order. Batches may span two epochs.

  Grain's `shuffle` and `batch` do the same one example at a time, which costs more than a step on digits does.
  """

  def __init__(self, source, batch_size, seed, shuffle, rows=None):
    self.source = source
    self.batch_size = batch_size
    self.seed = seed
    self.shuffle = shuffle
    self.rows = rows
    self.order = (None, None)  # the epoch whose order was made last, and the order: i64[n]

  def __call__(self, i):
    n, start = len(self.source), i * self.batch_size
    indices = np.arange(start, start + self.batch_size, dtype=np.int64)
    epochs, places = np.divmod(indices, n)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      places[here] = self._order(int(epoch))[places[here]]
    if self.rows is None:
      return self._take(places, indices)
    if getattr(self.source, 'is_of_batch', False):  # Weights by the share of a batch: packing.Sequences.
      return {key: x[self.rows] for key, x in self._take(places, indices).items()}
    return self._take(places[self.rows], indices[self.rows])

  def _take(self, places, indices):
    draw = getattr(self.source, 'draw', None)  # images.Images augments.
    return draw(places, indices, self.seed) if draw else self.source.take(places)

  def _order(self, epoch):
    if not self.shuffle:
      return np.arange(len(self.source))
    last, order = self.order
    if last != epoch:
      rng = np.random.default_rng((self.seed, epoch))
      own = getattr(self.source, 'order', None)  # packing.ByLength keeps rows of similar lengths together.
      order = own(rng, self.batch_size) if own else rng.permutation(len(self.source))
      self.order = epoch, order
    return order


def batches(source, batch_size, seed, shuffle=True, repeat=True, rows=None):
  """Iterates over batches for training.

  Args:
    source: what `load` gives.
    batch_size: b, examples a batch.
    seed: of the order. Each epoch has its own.
    shuffle: whether examples come in random order.
    repeat: whether to go on for ever; if not, one epoch, and what does not fill a batch is left out.
    rows: i64[n], those of each batch that are read here, where machines share out a batch (mesh.py); None for all.

  Returns:
    A Grain iterator of {key: [b, ...]}, with `get_state()` and `set_state(state)`.
  """
  if not 1 <= batch_size <= len(source):
    raise ValueError(
        f'Batches of {batch_size}: the source has {len(source)} examples. Choose a batch_size from 1 to {len(source)}.')
  count = sys.maxsize // batch_size if repeat else len(source) // batch_size
  threads = getattr(source, 'threads', 0)
  return iter(
      grain.MapDataset.range(count)
      .map(_Sampler(source, batch_size, seed, shuffle, rows))
      .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def epoch(source, batch_size, rows=None):
  """Yields every example once, in order, for evaluation.

  Args:
    source: what `load` gives.
    batch_size: b. All batches have b rows, so that the step compiles once.
    rows: as of `batches`.

  Yields:
    {key: [b, ...], 'mask': bool[b]}: rows whose mask is False repeat the last example, to fill the last batch.
  """
  for start in range(0, len(source), batch_size):
    indices = np.arange(start, start + batch_size)[slice(None) if rows is None else rows]
    batch = source.take(np.minimum(indices, len(source) - 1))
    yield batch | {'mask': indices < len(source)}
