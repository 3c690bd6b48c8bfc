"""Random access to examples, a batch at a time.

A source has a length and `take(indices)`, which gathers a batch: {'image': f32[b, h, w, c], 'label': i32[b]}
or {'tokens': i32[b, t + 1]}. One that training sees otherwise, by chance, has `draw(indices, positions, seed)` as well
(images.py); so many `threads` read batches ahead. Batches are gathered whole because Python costs more than the copy:
on 2 cores one example at a time, as Grain's own `batch` does it, takes 2 ms for 64 digits, and this 0.05 ms.
"""

import numpy as np


class Arrays:
  """Examples held in memory, stored as they came and converted when taken."""

  threads = 0  # That read ahead: a copy in memory is faster than handing it from a thread.

  def __init__(self, columns, convert):
    """Holds the columns.

    Args:
      columns: {key: [n, ...]}.
      convert: turns {key: [b, ...]} into what the model is given.
    """
    self.columns = columns
    self.convert = convert

  def __len__(self):
    return len(next(iter(self.columns.values())))

  def take(self, indices):
    """Gathers i64[b] examples: {key: [b, ...]}."""
    return self.convert({key: column[indices] for key, column in self.columns.items()})


class Records:
  """Examples read from a TFDS data source as they are needed."""

  threads = 2  # Reading from disk overlaps with the step.

  def __init__(self, data_source, keys, convert):
    """Keeps the data source, and which keys of its examples to read."""
    self.data_source = data_source
    self.keys = keys
    self.convert = convert

  def __len__(self):
    return len(self.data_source)

  def take(self, indices):
    """Gathers i64[b] examples: {key: [b, ...]}."""
    return self.convert(self._read(indices))

  def _read(self, indices):
    examples = self.data_source.__getitems__([int(i) for i in indices])
    return {key: np.stack([example[key] for example in examples]) for key in self.keys}

  def copy(self):
    """The same examples, in memory."""
    return Arrays(self._read(range(len(self))), self.convert)


class Windows:
  """Windows of a long text: window i is the `length + 1` tokens from i * stride.

  The last of them is there to be predicted: `length` inputs have `length` targets.
  """

  def __init__(self, tokens, length, stride):
    """Holds the text.

    Args:
      tokens: u8[n].
      length: inputs a window.
      stride: tokens from one window to the next; `length` predicts each token exactly once.
    """
    if min(length, stride) < 1:
      raise ValueError(
          f'Windows of length {length} and stride {stride}: both count tokens. Give at least 1.')
    if len(tokens) <= length:
      raise ValueError(
          f'Windows of {length} + 1 tokens: the text has {len(tokens)}. Shorten them, or take more text.')
    self.tokens = tokens
    self.length = length
    self.stride = stride

  def __len__(self):
    return (len(self.tokens) - self.length - 1) // self.stride + 1

  def take(self, indices):
    """Gathers i64[b] windows: {'tokens': i32[b, length + 1]}."""
    starts = np.asarray(indices, np.int64) * self.stride
    window = starts[:, None] + np.arange(self.length + 1)[None]  # [b, length + 1]
    return {'tokens': self.tokens[window].astype(np.int32)}


def images(highest):
  """The `convert` of labelled images whose brightest pixel is stored as `highest`."""

  def convert(batch):
    return {
        'image': batch['image'].astype(np.float32) / np.float32(highest),
        'label': batch['label'].astype(np.int32)}

  return convert
