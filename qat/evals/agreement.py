"""How near a quantized model's distributions are to the float model's, with error bars.

The quantities and their errors are those of llama.cpp's `perplexity --kl-divergence`,
https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity: KL(float || quantized) of each predicted
token, its mean, percentiles and maximum; "same top p", with a binomial error; ln(PPL quantized / PPL float), whose
error is that of the paired differences, far less than either perplexity's own.

Differences: the float model runs beside the quantized one, where llama.cpp reads log-probabilities that it stored
in 16 bits; percentiles have standard errors.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import mstats

from qat.evals import perplexity as ppls


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number and its standard error. Prints as 'value +- error'."""
  value: float
  error: float

  def __str__(self):
    return f'{self.value:.4g} +- {self.error:.2g}'


def mean(x):
  """The mean of independent numbers f64[n]; its error is NaN for one of them, or for an infinite one."""
  x = np.asarray(x, np.float64)
  known = x.size > 1 and np.isfinite(x).all()
  return Estimate(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(x.size) if known else math.nan)


def share(hits):
  """The share of True in bool[n], with its binomial error."""
  hits = np.asarray(hits)
  p, n = float(hits.mean()), hits.size
  return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan)


def percentile(x, percent):
  """A percentile of f64[n], linear between the two nearest numbers.

  The error is that of Maritz and Jarrett, A note on estimating the variance of the sample median, JASA 73, 1978.
  """
  x = np.asarray(x, np.float64)
  known = x.size > 1 and np.isfinite(x).all()
  error = float(mstats.mjci(x, [percent / 100])[0]) if known else math.nan
  with np.errstate(invalid='ignore'):  # Between two infinities there is no number.
    return Estimate(float(np.percentile(x, percent)), error)


@dataclasses.dataclass(frozen=True)
class Agreement:
  """A quantized model's outputs beside the float model's.

  Attributes:
    kl: f64[n], KL(float || quantized) in nats.
    same: bool[n], whether both put the same class first.
  """
  kl: np.ndarray
  same: np.ndarray

  mean_kl = property(lambda self: mean(self.kl))
  median_kl = property(lambda self: percentile(self.kl, 50))
  kl_99_9 = property(lambda self: percentile(self.kl, 99.9))
  max_kl = property(lambda self: float(self.kl.max()))
  same_top = property(lambda self: share(self.same))

  def plain(self):
    """As JSON holds it; '<name>_error' beside each estimate."""
    values = {name: getattr(self, name) for name in ('mean_kl', 'median_kl', 'kl_99_9', 'same_top')}
    flat = {name: e.value for name, e in values.items()} | {f'{name}_error': e.error for name, e in values.items()}
    return dict(flat, max_kl=self.max_kl)

  def __str__(self):
    return (f'KL mean {self.mean_kl}, median {self.median_kl}, 99.9 % {self.kl_99_9}, max {self.max_kl:.4g}; '
            f'same top {self.same_top}')


@dataclasses.dataclass(frozen=True)
class TextAgreement(Agreement):
  """That of two language models on one text.

  Attributes:
    reference, quantized: the two Perplexities.
  """
  reference: ppls.Perplexity
  quantized: ppls.Perplexity

  @property
  def log_ratio(self):
    """ln(PPL quantized / PPL float) a token, with the error of paired differences."""
    return mean(self.quantized.losses - self.reference.losses)

  def plain(self):
    return dict(super().plain(), perplexity=self.quantized.ppl, perplexity_error=self.quantized.error,
                float_perplexity=self.reference.ppl, log_ratio=self.log_ratio.value,
                log_ratio_error=self.log_ratio.error, protocol=self.quantized.protocol.plain())

  def __str__(self):
    return f'{self.quantized}\nfloat {self.reference.ppl:.4g}; ln ratio {self.log_ratio}; {super().__str__()}'


@jax.jit
def divergence(reference, logits):
  """KL(softmax(reference) || softmax(logits)) and same top, of each row.

  Args:
    reference, logits: float[n, c].

  Returns:
    f32[n], in nats, and bool[n]; of equal logits the first is the top.

  >>> divergence(jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[3.0, 1.0]])))[0].round(5)   # ln(2) - ln(3) / 2
  Array([0.14384], dtype=float32)
  """
  def row(pair):
    log_p, log_q = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in pair)
    p = jnp.exp(log_p)
    return jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(), jnp.argmax(pair[0]) == jnp.argmax(pair[1])  # 0 ln 0 is 0.

  return jax.lax.map(row, (reference, logits), batch_size=ppls.ROWS)


def agreement(reference, logits):
  """The Agreement of two classifiers' logits, float[n, c] each, on the same n inputs."""
  reference, logits = jnp.asarray(reference), jnp.asarray(logits)
  if reference.shape != logits.shape or reference.ndim != 2 or not reference.size:
    raise ValueError(f'agreement of logits of shapes {reference.shape} and {logits.shape}: both are [n, classes], of '
                     'the same inputs. Flatten leading axes, and give at least one row.')
  return Agreement(*_checked(divergence(reference, logits), ''))


def on_text(reference_fn, logits_fn, tokens, protocol):
  """The TextAgreement of two language models. One sequence of each is in memory at a time.

  Args:
    reference_fn, logits_fn: i32[1, window] -> float[1, window, vocabulary], as perplexity.parts takes them; the float
      model and the quantized one.
    tokens: i32[windows, window], of `protocol.cut`.
    protocol: what is measured.
  """
  columns, predicted = [], []
  for i, sequence in enumerate(protocol.sequences(tokens)):
    kl, same, *losses = (np.concatenate(column) for column in zip(*_compared(reference_fn, logits_fn, sequence)))
    columns.append((*_checked((kl, same), f' of window {i}'), *(ppls.known(a, i) for a in losses)))
    predicted.append(sequence[-1])
  kl, same, *losses = (np.concatenate(column) for column in zip(*columns))
  count = ppls.units(predicted, protocol)
  return TextAgreement(kl, same, *(ppls.Perplexity(a, count, protocol) for a in losses))


def _compared(reference_fn, logits_fn, sequence):
  """Yields (kl, same, losses of each) of the parts of one of `protocol.sequences`."""
  for (reference, logits), targets in ppls.parts([reference_fn, logits_fn], *sequence):
    yield *map(np.asarray, divergence(reference, logits)), *(ppls.losses_of(a, targets) for a in (reference, logits))
    del reference, logits  # Before those of the next part are made.


def _checked(pair, where):
  """(f64[n], bool[n]); raises at a NaN."""
  kl, same = np.asarray(pair[0], np.float64), np.asarray(pair[1])
  if np.isnan(kl).any():
    raise ValueError(f'The KL divergence{where} is NaN from row {int(np.isnan(kl).argmax())} on: a logit is NaN, or '
                     '+inf. Check both models on these inputs.')
  return kl, same
