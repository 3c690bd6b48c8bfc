"""A corpus as rows of tokens: documents one after the other, cut every `length` tokens.

    source = Corpus([tokenized(shard, tokenizer, separator), ...], length=2048)
    source.take(indices)      # {'tokens': i32[b, length + 1]}: `length` inputs and their targets

Row i holds the tokens from i * length on, and the first of the next row, so that an epoch predicts each token once. A
document ends in a `separator`; a row may hold the end of one and the beginning of the next, and tokens look back on all
of their row, as in GPT-3 (https://arxiv.org/abs/2005.14165, Sec. 2.2). What is left at the end is dropped.

A shard of a corpus, such as a file, is tokenized once and kept in the cache, 2 or 4 bytes a token, from which rows are
read as they are needed. A process that is killed leaves whole shards only, and the next one goes on.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import itertools
import os
import tempfile

import numpy as np

from qat.run import packages

BATCH = 1000  # Documents that are tokenized at a time, on all cores.
TOKENS, ENDS = 'tokens.bin', 'ends.npy'


@dataclasses.dataclass(frozen=True)
class Shard:
  """A part of a corpus.

  Attributes:
    key: what its texts depend on, in words: the cache goes by it.
    texts: () -> iterator of str, the documents.
  """
  key: str
  texts: Callable


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The documents of a shard.

  Attributes:
    tokens: u16[n] or u32[n], in a file.
    ends: i64[documents], where each ends, its separator included.
  """
  tokens: np.ndarray
  ends: np.ndarray

  def part(self, first, end):
    """The Tokens of documents `first` to `end`."""
    bounds = np.concatenate([[0], self.ends])
    return Tokens(self.tokens[bounds[first]:bounds[end]], self.ends[first:end] - bounds[first])


def tokenized(shard, tokenizer, separator):
  """The Tokens of a Shard, from the cache if they are there.

  Args:
    shard: Shard.
    tokenizer: tokenizers.Tokenizer; no special tokens are added.
    separator: the number of the token after each document; None for no token.
  """
  digest = hashlib.sha256('\n'.join([tokenizer.to_str(), str(separator), shard.key]).encode()).hexdigest()[:20]
  folder = packages.cache() / 'tokens' / digest
  dtype = np.dtype('uint16' if tokenizer.get_vocab_size() <= 1 << 16 else 'uint32')
  if not folder.is_dir():
    print(f'Tokenizing {shard.key.split()[0]}, which is done once.', flush=True)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.') as part:
      made = os.path.join(part, 'made')
      os.mkdir(made)
      _write(shard, tokenizer, separator, dtype, made)
      try:
        os.rename(made, folder)
      except OSError:
        if not folder.is_dir():  # Not another process that was first, but a real failure.
          raise
  ends = np.load(folder / ENDS)
  size = int(ends[-1]) if len(ends) else 0
  tokens = np.memmap(folder / TOKENS, dtype, 'r', shape=(size,)) if size else np.zeros(0, dtype)
  return Tokens(tokens, ends)


def _write(shard, tokenizer, separator, dtype, folder):
  """Tokenizes a shard into a folder, BATCH documents in memory at a time."""
  after, lengths, texts = [] if separator is None else [separator], [], iter(shard.texts())
  with open(os.path.join(folder, TOKENS), 'wb') as file:
    while some := list(itertools.islice(texts, BATCH)):
      for encoded in tokenizer.encode_batch(some, add_special_tokens=False):
        ids = np.array(encoded.ids + after, dtype)
        lengths.append(len(ids))
        file.write(ids.tobytes())
  np.save(os.path.join(folder, ENDS), np.cumsum(lengths, dtype=np.int64))


def drawn(parts, count, length, seed):
  """Sequences at random places of random documents that are long enough, for calibration: i32[count, length].

  Args:
    parts: list of Tokens.
    count, length: of the sequences.
    seed: of the random numbers.
  """
  places = [(part, start, end) for part in parts
            for start, end in zip(np.concatenate([[0], part.ends[:-1]]), part.ends) if end - start >= length]
  if not places:
    raise ValueError(f'{count} sequences of {length} tokens: no document has so many. Give a smaller '
                     'calibration.length, or more text.')
  random, found = np.random.default_rng(seed), []
  for i in random.integers(len(places), size=count):
    part, start, end = places[i]
    first = random.integers(start, end - length + 1)
    found.append(np.asarray(part.tokens[first:first + length], np.int32))
  return np.stack(found)


class Corpus:
  """A source of rows (sources.py says what that is)."""

  threads = 2

  def __init__(self, parts, length, vocab_size):
    """Reads nothing yet.

    Args:
      parts: list of u16[n] or u32[n], one after the other.
      length: inputs a row.
      vocab_size: of the tokenizer.
    """
    self.parts, self.length, self.vocab_size = parts, length, vocab_size
    self.starts = np.cumsum([0, *map(len, parts)])
    if length < 1 or len(self) < 1:
      raise ValueError(f'Rows of {length} + 1 tokens: the texts have {self.starts[-1]:,} in all. Give more text, or '
                       'another data.options.length.')

  def __len__(self):
    return (int(self.starts[-1]) - 1) // self.length

  def take(self, indices):
    """Gathers i64[b] rows: {'tokens': i32[b, length + 1]}."""
    return {'tokens': np.stack([self.row(int(i) * self.length) for i in indices])}

  def row(self, start):
    """The `length + 1` tokens from `start` on: i32[length + 1]."""
    end, found = start + self.length + 1, []
    at = int(np.searchsorted(self.starts, start, 'right')) - 1
    while start < end:
      inside = start - int(self.starts[at])
      found.append(np.asarray(self.parts[at][inside:inside + end - start], np.int32))
      start += len(found[-1])
      at += 1
    return np.concatenate(found)
