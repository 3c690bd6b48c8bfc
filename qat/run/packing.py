"""Documents of tokens made into sequences of one length, and which of their tokens are to be predicted.

    documents = [Document(tokens i32[n], counted bool[n]), ...]
    source = stream(documents, length=512, pad=0)
    source.take(indices)      # {'tokens': i32[b, length], 'weights': f32[b, length - 1]}

A packing is a function (documents, length, pad) -> Sequences; `config.data.packing` names one.

In `stream`, a sequence may hold the end of one document and the beginning of the next: tokens look back on all of
their sequence, and positions count from its beginning, as in GPT-3 (https://arxiv.org/abs/2005.14165, Sec. 2.2). In
`rows` they never do.
"""

import dataclasses

import numpy as np

PAD_TO = 64  # Rows are padded to a multiple of this, so that few shapes are compiled.


@dataclasses.dataclass(frozen=True)
class Document:
  """A text.

  Attributes:
    tokens: i32[n].
    counted: bool[n], which of them a loss is taken of.
  """
  tokens: np.ndarray
  counted: np.ndarray


class Sequences:
  """Rows of tokens, a batch as long as its longest.

  `weights` are 1 for tokens that count, over their share of the batch: the mean of weight times loss, over a batch or
  over equal parts of one, is the mean loss of the tokens that count.
  """
  is_of_batch = True  # A row's weights and length depend on the others.

  def __init__(self, tokens, counted, lengths):
    """Holds i32[n, length], bool[n, length], and i32[n], the tokens of each row before padding."""
    self.tokens, self.counted, self.lengths = tokens, counted, lengths

  def __len__(self):
    return len(self.tokens)

  def take(self, indices):
    """Gathers i64[b] rows: {'tokens': i32[b, t], 'weights': f32[b, t - 1]}, of all tokens but the first."""
    t = min(-(-int(self.lengths[indices].max()) // PAD_TO) * PAD_TO, self.tokens.shape[1])
    counted = self.counted[indices][:, 1:t]
    share = max(counted.sum(), 1) / counted.size
    return {'tokens': self.tokens[indices][:, :t], 'weights': counted.astype(np.float32) / np.float32(share)}


class Whole(Sequences):
  """Rows to be scored: all of one length, and weights by the share of the whole set, whatever the batches."""
  is_of_batch = False

  def __init__(self, sequences):
    super().__init__(sequences.tokens, sequences.counted, sequences.lengths)
    self.share = self.counted[:, 1:].mean()

  def take(self, indices):
    return {'tokens': self.tokens[indices],
            'weights': self.counted[indices][:, 1:].astype(np.float32) / np.float32(self.share)}


def stream(documents, length, pad):
  """Documents one after the other, `pad` after each, cut every `length` tokens; what is left at the end is dropped."""
  ends = [np.array([d.counted.all()]) for d in documents]                # After a chat, it is no part of an answer.
  tokens = np.concatenate([x for d in documents for x in (d.tokens, np.array([pad], np.int32))])
  counted = np.concatenate([x for d, end in zip(documents, ends) for x in (d.counted, end)])
  count = len(tokens) // length
  if not count:
    raise ValueError(f'The texts have {len(tokens)} tokens in all, and a sequence takes {length}. Give more text, or a '
                     'smaller data.length.')
  cut = lambda x: x[:count * length].reshape(count, length)
  return _some(Sequences(cut(tokens), cut(counted), np.full(count, length)))


def rows(documents, length, pad):
  """A document a row, padded; what is beyond `length` tokens is cut off, and documents of one token are left out."""
  documents = [d for d in documents if len(d.tokens) > 1]
  if not documents:
    raise ValueError('No document has 2 tokens: there is nothing to predict. Give longer texts.')
  lengths = np.array([min(len(d.tokens), length) for d in documents])
  shape = len(documents), lengths.max()
  tokens, counted = np.full(shape, pad, np.int32), np.zeros(shape, bool)
  for i, (document, n) in enumerate(zip(documents, lengths)):
    tokens[i, :n], counted[i, :n] = document.tokens[:n], document.counted[:n]
  return _some(Sequences(tokens, counted, lengths))


def pieces(document, length):
  """The Documents of `length` tokens, the last of what is left, that a document is cut into."""
  return [Document(document.tokens[i:i + length], document.counted[i:i + length])
          for i in range(0, len(document.tokens), length)]


def rows_by_length(documents, length, pad):
  """`rows`, which are drawn in batches of similar lengths, so that less is padding."""
  plain = rows(documents, length, pad)
  return ByLength(plain.tokens, plain.counted, plain.lengths)


class ByLength(Sequences):
  """Keeps rows of similar lengths together: an epoch is shuffled and cut into chunks, which are sorted."""
  CHUNK = 50  # Batches in a chunk, as in Hugging Face's LengthGroupedSampler.

  def order(self, rng, batch_size):
    """The order of an epoch, i64[n]: its batches of `batch_size` in random order; what fills none is last."""
    order, chunk = rng.permutation(len(self)), self.CHUNK * batch_size
    chunks = [order[i:i + chunk] for i in range(0, len(order), chunk)]
    order = np.concatenate([c[np.argsort(-self.lengths[c], kind='stable')] for c in chunks])
    whole = len(order) // batch_size * batch_size
    batches = order[:whole].reshape(-1, batch_size)
    return np.concatenate([batches[rng.permutation(len(batches))].ravel(), order[whole:]])


def _some(sequences):
  if not sequences.counted[:, 1:].any():
    raise ValueError(f'None of the {sequences.counted.size} tokens counts for the loss: the answers lie beyond '
                     f'{sequences.tokens.shape[1]} tokens, or there are none. Give a larger data.length, or chats with '
                     'answers.')
  return sequences
