"""Texts into classes: a published encoder with a new head, and labelled texts by name. Part of `qat finetune`.

    config.head = dict(scale=20.0)       # In a config of qat finetune: classes in place of next tokens.
    config.objective = 'text_classification'

The head trains in full, beside whatever adapters there are. It reads the embedding that the encoder was published for,
the mean over tokens, of length 1; `scale` makes it long enough to be told apart. Both are left in adapter/ in PEFT's
layout, for a classifier whose logits are W e + b of the embedding e:

    network, config = published.load('minilm'), configs.load('runs/minilm_lora')
    model = classification.with_head(network, config)
    model = peft.load(model, 'runs/minilm_lora/adapter', families.FAMILIES['bert'], head=classification.saved(model))
"""

import dataclasses
import inspect

from flax import nnx
import numpy as np

from qat.export import peft
from qat.models import encoder as encoders
from qat.run import names
from qat.run import sentences
from qat.run import verses

HEAD = 'head'  # The attribute whose Params train.

# The parts of the Bible, by the number of their last book.
SECTIONS = dict(law=5, history=17, wisdom=22, prophets=39, gospels_and_acts=44, letters=65, revelation=66)
HELD_OUT = 10  # Every tenth chapter is.


class Classifier(nnx.Module):
  """An encoder and a linear head on its embedding."""

  def __init__(self, encoder, classes, scale, rngs):
    self.encoder, self.scale = encoder, float(scale)
    self.head = nnx.Linear(encoder.config.width, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

  @property
  def config(self):
    return self.encoder.config

  def __call__(self, inputs):
    """{'tokens': i32[b, t], 'attended': bool[b, t]} -> f32[b, classes]."""
    x = self.encoder(inputs['tokens'], inputs['attended'])               # [b, t, width]
    return self.head(self.scale * encoders.pool(x, inputs['attended']))


class Labelled:
  """Rows of tokens with a class each: a source of qat/run/data.py."""

  def __init__(self, tokens, attended, labels):
    """Holds i32[n, t], bool[n, t] and i32[n]."""
    self.tokens, self.attended, self.labels = tokens, attended, labels

  def __len__(self):
    return len(self.labels)

  def take(self, indices):
    return {'tokens': self.tokens[indices], 'attended': self.attended[indices], 'label': self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class Examples:
  """Texts, the class of each, and the names of the classes."""
  texts: list
  labels: np.ndarray
  classes: tuple


def sections(split, version='web'):
  """Verses of the Bible, and which of its SECTIONS each is from; of every tenth chapter in the test."""
  found = verses.verses(version, 'readers')
  last = np.array(list(SECTIONS.values()))
  chosen = [n for n in sorted(found) if (n // 1000 % 1000 % HELD_OUT == 0) == (split == 'test')]
  labels = np.searchsorted(last, [n // 1_000_000 for n in chosen]).astype(np.int32)
  return Examples([found[n] for n in chosen], labels, tuple(SECTIONS))


TEXTS = dict(sections=sections)


def load(name, split, **options):
  """The Examples of a split, 'train' or 'test'."""
  if name not in TEXTS:
    raise ValueError(f'data.name {name!r}: there are no labelled texts of that name. {names.suggest(name, TEXTS)}')
  known = list(inspect.signature(TEXTS[name]).parameters)[1:]
  if wrong := sorted(set(options) - set(known)):
    raise ValueError(f'data.options {wrong} of {name!r}: those it has are {known}. Leave out the others.')
  return TEXTS[name](split, **options)


def sources(config, network):
  """(training examples, test examples), Labelled; the test is as many as eval.sequences, drawn once for all seeds."""
  train, test = (load(config.data.name, split, **config.data.options) for split in ('train', 'test'))
  some = np.random.default_rng(0).permutation(len(test.labels))[:config.eval.sequences]
  test = Examples([test.texts[i] for i in some], test.labels[some], test.classes)
  return tuple(Labelled(*sentences.encode(network.tokenizer, examples.texts, length), examples.labels)
               for examples, length in ((train, config.data.length), (test, config.eval.length)))


def saved(model):
  """The peft.Head of a Classifier."""
  return peft.Head(HEAD, 'classifier', body='encoder', scale=model.scale)


def with_head(network, config):
  """The Classifier of a published encoder, its classes those of the data; its head begins at zero."""
  if not isinstance(network.model, encoders.Encoder):
    raise ValueError(f'pretrained {config.pretrained!r} is a {type(network.model).__name__}: texts are classified by '
                     'encoders here. Give one, such as minilm, or a config without a head.')
  if network.tokenizer is None:
    raise ValueError(f'pretrained {config.pretrained!r} has no tokenizer beside its weights: texts cannot be read. Put '
                     'a tokenizer.json beside them.')
  there = network.model.config.context_length
  if not 2 <= max(config.data.length, config.eval.length) <= there:
    raise ValueError(f'data.length {config.data.length} and eval.length {config.eval.length}: the encoder reads up to '
                     f'{there} tokens. Choose lengths within.')
  classes = load(config.data.name, 'test', **config.data.options).classes
  return Classifier(network.model, len(classes), config.head.scale, nnx.Rngs(config.seed))
