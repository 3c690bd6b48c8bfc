"""QDrop: leave some inputs in floats at random while the weights' rounding is learned.

Wei et al. QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization, ICLR 2022.
https://arxiv.org/abs/2203.05740

Any input quantizer, whose rounding is dropped for each number with a probability, 0.5 in the paper, while a block
is reconstructed. At all other times it is that quantizer.

Difference from the authors' code: the input of the block itself, where they mix what the quantized and the float
network feed it, is the caller's (ptq/reconstruct.py takes the inputs as they are).
"""

from flax import nnx
import jax
import jax.numpy as jnp

from qat.quantizers import base, streams


def drop(x, x_hat, key, probability):
  """`x` where quantization is dropped, and `x_hat` elsewhere: [*shape]."""
  return jnp.where(jax.random.bernoulli(key, probability, x.shape), x, x_hat)


class QDrop(base.Quantizer):

  def __init__(self, quantizer, probability=0.5):
    """`quantizer`: of the input, such as LSQ(spec)."""
    self.quantizer, self.probability, self.lead = quantizer, probability, ()

  spec = property(lambda self: self.quantizer.spec)
  observer = property(lambda self: self.quantizer.observer)
  unsigned = property(lambda self: getattr(self.quantizer, 'unsigned', None))

  def with_spec(self, spec):
    return QDrop(self.quantizer.with_spec(spec), self.probability)

  def for_weight(self, w):
    raise ValueError(f'QDrop was given as the quantizer of a weight of shape {w.shape}: it drops the rounding of '
                     'inputs, so that the rounding of weights learns to live with both. Use AdaRound for the weight.')

  def for_input(self, lead, scale=None, zero=None):
    new = QDrop(self.quantizer.for_input(lead, scale, zero), self.probability)
    new.lead = lead
    return new

  def grid(self, x):
    return self.quantizer.grid(x)

  def prepare(self, x):
    return self.quantizer.prepare(x)

  def encode(self, x):
    return self.quantizer.encode(x)

  def both(self, x):
    return self.quantizer.both(x)

  def __call__(self, x):
    return self.quantizer(x)

  def advance(self):
    self.quantizer.advance()

  def relaxed(self):
    return Dropping(self)

  def frozen(self):
    return self.quantizer.frozen()


class Dropping(nnx.Module):
  """The relaxed form of a QDrop. It has no codes, and so is no Quantizer: products take its floats."""

  observer = None

  def __init__(self, whole):
    self.whole, self.stream = whole, streams.Stream(jax.random.key(0), whole.lead)

  def reseed(self, key):
    """Other draws than those of other layers."""
    self.stream = streams.Stream(key, self.whole.lead)

  def __call__(self, x):
    return drop(x, self.whole(x), self.stream(), self.whole.probability)

  def advance(self):
    self.whole.advance()
    self.stream.advance()

  def relaxed(self):
    return self

  def settled(self):
    return self.whole

  def penalty(self, progress):
    return self.whole.penalty(progress)
