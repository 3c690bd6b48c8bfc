"""Perplexity: exp of the mean loss of a text's next tokens, under a protocol that is printed with the number.

Jelinek et al. Perplexity, a measure of the difficulty of speech recognition tasks, J. Acoust. Soc. Am. 62, 1977.

Two perplexities can be compared if their protocols are equal: the text, how it is cut, how much of it each token
may look back on, and what the loss is divided by.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Unit:
  """What the loss is divided by.

  Attributes:
    name: of one, in words.
    count: predicted tokens i32[k] -> how many of the unit they are.
  """
  name: str
  count: Callable = dataclasses.field(compare=False, repr=False)


TOKEN = Unit('token', len)


def word(decode):
  """Runs of characters between spaces. `decode`: tokens i32[k] -> str, the tokenizer's."""
  return Unit('word', lambda tokens: len(decode(tokens).split()))


def byte(decode):
  """Bytes of UTF-8: perplexities of models with other vocabularies compare. `decode`: tokens i32[k] -> str."""
  return Unit('byte', lambda tokens: len(decode(tokens).encode()))


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a perplexity is measured. Its str() goes with the number.

  Attributes:
    text: what is read, in words: the corpus and the split.
    windows: how many windows are read.
    window: tokens a window, without the `bos`.
    stride: from the start of a window to that of the next. Where it is less than the window, only the last
      `stride` targets of each window are counted, and all of the first: every token has a long past.
    bos: the token put before each window, whose first token is then predicted too; None for no token.
    unit: what the loss is divided by.
  """
  text: str
  windows: int
  window: int
  stride: int
  bos: int | None = None
  unit: Unit = TOKEN

  def __post_init__(self):
    if self.windows < 1 or self.targets < 1 or not 1 <= self.stride <= self.window:
      raise ValueError(f'{self!r}: it takes one window or more, of 2 tokens or more (1 after a bos), and a stride of 1 '
                       'to the window. Choose other sizes.')

  @property
  def targets(self):
    """Predicted tokens in the first window."""
    return self.window - (self.bos is None)

  @property
  def predicted(self):
    """Predicted tokens in all windows."""
    return self.targets + (self.windows - 1) * min(self.stride, self.targets)

  def cut(self, stream):
    """The first `windows` windows of a text: i32[m] -> i32[windows, window]."""
    stream = np.asarray(stream)
    needed = self.window + (self.windows - 1) * self.stride
    if stream.ndim != 1 or len(stream) < needed:
      raise ValueError(f'{self} reads {needed:,} tokens: the text has shape {stream.shape}. '
                       'Give one longer row of tokens, or ask for fewer windows.')
    return np.stack([stream[i * self.stride:i * self.stride + self.window] for i in range(self.windows)])

  def sequences(self, tokens):
    """Yields (inputs i32[1, window], positions: slice, targets i32[k]) of each window.

    `inputs` are what the model reads; its logits at `positions` are to predict `targets`.
    """
    for i, row in enumerate(self._checked(tokens)):
      inputs = row if self.bos is None else np.concatenate([np.asarray([self.bos], row.dtype), row[:-1]])
      counted = self.targets if i == 0 else min(self.stride, self.targets)
      yield jnp.asarray(inputs[None]), slice(self.targets - counted, self.targets), row[self.window - counted:]

  def _checked(self, tokens):
    tokens = np.asarray(tokens)
    if tokens.shape != (self.windows, self.window) or not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(f'{self} reads whole numbers of shape {(self.windows, self.window)}: the tokens are '
                       f'{tokens.dtype} of shape {tokens.shape}. Make them by Protocol.cut.')
    if tokens.min() < 0:
      raise ValueError(f'A token is {tokens.min()}: tokens are indices of the vocabulary, 0 or more. Cut padding off.')
    return tokens

  def plain(self):
    """As JSON holds it: {name: str or number}."""
    return dict(text=self.text, windows=self.windows, window=self.window, stride=self.stride, bos=self.bos,
                unit=self.unit.name, predicted=self.predicted)

  def __str__(self):
    bos = 'no BOS' if self.bos is None else f'BOS {self.bos}'
    return (f'a {self.unit.name}, over {self.predicted:,} predicted tokens of {self.text}: {self.windows} windows of '
            f'{self.window}, stride {self.stride}, {bos}')


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """A perplexity and where it comes from.

  Attributes:
    losses: f64[predicted], -ln p of each predicted token.
    count: how many of the protocol's unit they are.
    protocol: how they were measured.
  """
  losses: np.ndarray
  count: int
  protocol: Protocol

  @property
  def nll_sum(self):
    return float(self.losses.sum())

  @property
  def ppl(self):
    """exp(nll_sum / count); infinite where float64 ends."""
    mean = self.nll_sum / self.count
    return math.exp(mean) if mean < 709 else math.inf

  @property
  def error(self):
    """The standard error: ppl times that of the mean loss, as if tokens were independent. NaN for one token."""
    n = len(self.losses)
    spread = float(np.std(self.losses, ddof=1)) if n > 1 else math.nan
    return self.ppl * math.sqrt(n) * spread / self.count

  @property
  def bits(self):
    """Bits a unit: nll_sum / count / ln 2."""
    return self.nll_sum / self.count / math.log(2)

  def __str__(self):
    return f'perplexity {self.ppl:.4g} +- {self.error:.2g} {self.protocol}'


ROWS = 32       # whose softmax is in memory at a time: vocabularies are large.
POSITIONS = 64  # whose logits are: 12 MiB of a vocabulary of 49,152.


@jax.jit
def nll(logits, targets):
  """-log softmax(logits)[target]: float[t, v], i32[t] -> f32[t]; NaN for a target beyond the vocabulary.

  >>> nll(jnp.array([[0.0, jnp.log(3.0)]]), jnp.array([1])).round(5)   # -ln(3/4)
  Array([0.28768], dtype=float32)
  """
  def row(given):
    logits, target = given[0].astype(jnp.float32), given[1]
    u = logits - jnp.max(logits)  # Before the sum: its logarithm keeps all its digits.
    return jnp.log(jnp.sum(jnp.exp(u))) - u.at[target].get(mode='fill', fill_value=jnp.nan)

  return jax.lax.map(row, (logits, targets), batch_size=ROWS)


def parts(logits_fns, inputs, positions, targets):
  """Yields what models predict of one sequence, POSITIONS at a time.

  Args:
    logits_fns: each i32[1, t] -> float[1, t, v], an array or what gives its rows by [0, slice], as running.Rows does.
    inputs: i32[1, t].
    positions: slice of length k, of the logits that count.
    targets: i32[k], what they are to predict.

  Yields:
    [float[n, v] of each function], i32[n]. Let go of them before the next are asked for.
  """
  found = [_checked(f(inputs), inputs) for f in logits_fns]
  for start in range(positions.start, positions.stop, POSITIONS):
    here = slice(start, min(start + POSITIONS, positions.stop))
    yield [logits[0, here] for logits in found], targets[here.start - positions.start:here.stop - positions.start]


def _checked(logits, inputs):
  """The logits of a sequence, if they are of its shape."""
  if len(logits.shape) != 3 or logits.shape[:2] != inputs.shape:
    raise ValueError(f'logits_fn returned shape {logits.shape} for tokens of shape {inputs.shape}: it is to return '
                     '[sequences, tokens, vocabulary]. Check what the model returns.')
  return logits


def perplexity(logits_fn, tokens, protocol):
  """The perplexity of a text.

  One sequence is in memory at a time; losses are float32, and their sum float64.

  Args:
    logits_fn: i32[1, window] -> float[1, window, vocabulary], of a causal model, as `parts` takes it; jit it.
    tokens: i32[windows, window], of `protocol.cut`.
    protocol: what is measured.

  Returns:
    Perplexity.
  """
  losses, predicted = [], []
  for i, sequence in enumerate(protocol.sequences(tokens)):
    found = [losses_of(logits, targets) for (logits,), targets in parts([logits_fn], *sequence)]
    losses.append(known(np.concatenate(found), i))
    predicted.append(sequence[-1])
  return Perplexity(np.concatenate(losses), units(predicted, protocol), protocol)


def losses_of(logits, targets):
  """f64[k] of float[k, v] and i32[k]."""
  return np.asarray(nll(logits, jnp.asarray(targets)), np.float64)


def known(losses, window):
  """The losses f64[k] of one window; raises at a NaN, naming the window by its number."""
  if np.isnan(losses).any():
    raise ValueError(f'The loss of window {window} is NaN from predicted token {int(np.isnan(losses).argmax())} on: a '
                     'logit is NaN, or a token is beyond the vocabulary. Check the model and the tokenizer.')
  return losses


def units(predicted, protocol):
  """How many of the protocol's unit the windows' predicted tokens [i32[k]] are."""
  count = protocol.unit.count(np.concatenate(predicted))
  if not count:
    raise ValueError(f'The predicted tokens are not one {protocol.unit.name}: nothing to divide by. '
                     'Check the decode of the unit.')
  return count
