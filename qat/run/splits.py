"""Slices of splits of local files, as TFDS writes them: 'train', 'train[:10%]', 'train[5:]', 'train[:2]+train[9:]'."""

import tensorflow_datasets as tfds


def ranges(split, sizes):
  """The examples of a split or of slices: [(split, first, end)].

  Args:
    split: as above.
    sizes: {split: its number of examples}.

  >>> ranges('train[:10%]+train[-2:]', dict(train=50))
  [('train', 0, 5), ('train', 48, 50)]
  """
  infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0, filename_template=None)
           for name, n in sizes.items()}
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  except (AssertionError, KeyError, ValueError) as error:
    raise ValueError(f"Split {split!r}: the splits have {sizes or 'nothing'}. Name one, or a slice of one such as "
                     "'train[:10%]'.") from error
  found = [(part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to) for part in parts]
  if not sum(end - first for _, first, end in found):
    raise ValueError(f'Split {split!r}: it is empty, and the splits have {sizes}. Take a larger slice.')
  return found


def names(split):
  """The splits that are named in a split or slices.

  >>> names('train[:10%]+test')
  ['test', 'train']
  """
  return sorted({part.split('[')[0].strip() for part in split.split('+')})
