"""Sentences as the batches that an encoder reads, and as its embeddings."""

import copy

from flax import nnx
import numpy as np

from qat.models import encoder

# Lengths are padded to multiples of this, so that few are compiled.
LENGTH_STEP = 16


def encode(tokenizer, texts, length=256):
  """Tokens of sentences, filled up to the longest.

  Args:
    tokenizer: tokenizers.Tokenizer; what it says of padding and truncation is not used, but for the token that fills.
    texts: list of n str.
    length: where tokens are cut off. all-MiniLM-L6-v2 was published with 256.

  Returns:
    (i32[n, t], bool[n, t]), the tokens, and True where they are not filling; t is a multiple of 16, or `length`.
  """
  if isinstance(texts, str) or not len(texts):
    raise ValueError(f'encode was given {texts!r:.40}: it takes a list of at least one sentence. Put it in a list.')
  filling = (tokenizer.padding or {}).get('pad_id', 0)
  tokenizer = copy.deepcopy(tokenizer)  # The next two change it.
  tokenizer.no_padding()
  tokenizer.enable_truncation(length)
  rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
  tokens = np.full((len(rows), _padded(max(map(len, rows)), length)), filling, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    tokens[i, :len(row)], mask[i, :len(row)] = row, True
  return tokens, mask


def embed(model, tokenizer, texts, length=256, batch=64):
  """The embedding of each sentence: the mean over its tokens, of length 1.

  Args:
    model: encoder.Encoder, float or quantized. Where an input's range is that of the batch, filling counts in it.
    tokenizer, texts, length: as in `encode`.
    batch: how many sentences at a time. Those of like lengths go together.

  Returns:
    f32[n, width].
  """
  tokens, mask = encode(tokenizer, texts, length)
  lengths = mask.sum(axis=1)
  order = np.argsort(lengths, kind='stable')
  rows = np.resize(order, -(-len(order) // batch) * batch).reshape(-1, batch)  # The last batch is filled by the first.
  out = np.zeros((len(texts), model.config.width), np.float32)
  for few in rows:
    t = _padded(lengths[few].max(), length)
    out[few] = _embed(model, tokens[few, :t], mask[few, :t])
  return out


def _padded(t, length):
  """The next multiple of LENGTH_STEP, or `length` if that is less."""
  return min(length, max(1, -(-t // LENGTH_STEP)) * LENGTH_STEP)


@nnx.jit
def _embed(model, tokens, mask):
  return encoder.pool(model(tokens, mask), mask)
