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
from qat.run import mnist
from qat.run import prepared
from qat.run import shakespeare
from qat.run import sources

SETS = dict(digits=digits.load, mnist=mnist.load, shakespeare=shakespeare.load)


def load(name, split, data_dir=None, **options):
  """Loads a split of a dataset.

  Args:
    name: one of SETS, which come by themselves; or that of a prepared TFDS dataset: 'cifar10', 'name/config:1.0.0'.
    split: 'train', 'test', or a slice, 'train[:10%]'.
    data_dir: the folder of prepared datasets. Where it is given the dataset is read from it, whatever its name.
    **options: of the set: `context_length` and `stride` of shakespeare.

  Returns:
    A source: sources.Arrays, Records or Windows.

  >>> len(load('digits', 'train')), len(load('digits', 'test'))
  (1297, 500)
  """
  ours = name in SETS and data_dir is None
  known = set(inspect.signature(SETS[name]).parameters) - {'split'} if ours else set()
  if not options.keys() <= known:
    raise ValueError(
        f'Options {sorted(options)} of dataset {name!r}: those it has are {sorted(known)}. Leave out the others.')
  if ours:
    return SETS[name](split, **options)
  try:
    builder = prepared.find(name, data_dir)
  except ValueError as error:
    raise ValueError(f'{error} Datasets that need no preparation, if no data_dir is given: {sorted(SETS)}.') from error
  return prepared.load(builder, split)


class _Sampler:
  """Batch number i of an endless row of epochs, each in its own order. Batches may span two epochs.

  Grain's `shuffle` and `batch` do the same one example at a time, which costs more than a step on digits does.
  """

  def __init__(self, source, batch_size, seed, shuffle):
    self.source = source
    self.batch_size = batch_size
    self.seed = seed
    self.shuffle = shuffle
    self.order = (None, None)  # the epoch whose order was made last, and the order: i64[n]

  def __call__(self, i):
    n, start = len(self.source), i * self.batch_size
    indices = np.arange(start, start + self.batch_size, dtype=np.int64)
    epochs, places = np.divmod(indices, n)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      places[here] = self._order(int(epoch))[places[here]]
    return self.source.take(places)

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


def batches(source, batch_size, seed, shuffle=True, repeat=True):
  """Iterates over batches for training.

  Args:
    source: what `load` gives.
    batch_size: b, examples a batch.
    seed: of the order. Each epoch has its own.
    shuffle: whether examples come in random order.
    repeat: whether to go on for ever; if not, one epoch, and what does not fill a batch is left out.

  Returns:
    A Grain iterator of {key: [b, ...]}, with `get_state()` and `set_state(state)`.
  """
  if not 1 <= batch_size <= len(source):
    raise ValueError(
        f'Batches of {batch_size}: the source has {len(source)} examples. Choose a batch_size from 1 to {len(source)}.')
  count = sys.maxsize // batch_size if repeat else len(source) // batch_size
  # Reading from disk overlaps with the step; a copy in memory is faster than handing it from a thread.
  threads = 2 if isinstance(source, sources.Records) else 0
  return iter(
      grain.MapDataset.range(count)
      .map(_Sampler(source, batch_size, seed, shuffle))
      .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def epoch(source, batch_size):
  """Yields every example once, in order, for evaluation.

  Args:
    source: what `load` gives.
    batch_size: b. All batches have b rows, so that the step compiles once.

  Yields:
    {key: [b, ...], 'mask': bool[b]}: rows whose mask is False repeat the last example, to fill the last batch.
  """
  for start in range(0, len(source), batch_size):
    indices = np.arange(start, start + batch_size)
    batch = source.take(np.minimum(indices, len(source) - 1))
    yield batch | {'mask': indices < len(source)}
