"""AdaRound: learn for each weight whether it is rounded down or up.

Nagel et al. Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.
https://arxiv.org/abs/2004.10568
Names are the paper's: V is learned, h(V) in [0, 1] is the rectified sigmoid, stretched to (gamma, zeta),
that stands for "up" while it is trained, and beta anneals the regularizer that drives it to 0 or 1.

Differences from the paper: any format, of which integers are the paper's; V may start from given codes;
codes that are no neighbours of their weight, as GPTQ makes, keep their distance and are rounded around it.
beta falls linearly, as in BRECQ (the paper says annealed, and names no curve).
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray, ranges
from qat.quantizers import base, neighbours

ZETA, GAMMA = 1.1, -0.1                                                 # Sec. 3.2
BETA, WARMUP = (20.0, 2.0), 0.2                                         # BRECQ's code; the first fifth has no penalty.
MARGIN = 0.05  # How far h starts on the side of a given code, where the fraction is on the other.


def h(V: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """The rectified sigmoid, clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)  (Eq. 23).

  >>> h(jnp.array([-9.0, 0.0, 9.0]))
  Array([0. , 0.5, 1. ], dtype=float32)
  """
  return jnp.clip(jax.nn.sigmoid(V) * (ZETA - GAMMA) + GAMMA, 0, 1)


def h_inverse(fraction: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """The V at which h(V) is the fraction: -log((zeta - gamma) / (fraction - gamma) - 1)."""
  return -jnp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def soft(V: Float[Array, '*shape'], low: Float[Array, '*shape'],
         high: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """clip(floor(W / s) + h(V), n, p), in units of the codes  (Eq. 22)."""
  return low + h(V) * (high - low)


def regularizer(V: Float[Array, '*shape'], beta) -> Float[Array, '']:
  """sum 1 - |2 h(V) - 1|^beta  (Eq. 24)."""
  return jnp.sum(1 - jnp.abs(2 * h(V) - 1) ** beta)


def annealed(progress, beta=BETA, warmup=WARMUP):
  """beta at `progress` in [0, 1]: its first value until the warmup ends, then linearly to its last."""
  left = jnp.clip((1 - progress) / (1 - warmup), 0, 1)
  return beta[1] + (beta[0] - beta[1]) * left


class AdaRound(base.Quantizer):
  """Rounds up where V > 0. Its gradient by V is that of the soft form.

  Attributes:
    spec, rule: the grid, and its range rule; the paper's scales have the least squared error.
    regularization: lambda, what the regularizer is multiplied by. 0.01 in the paper; BRECQ has 0.1 for
      MobileNetV2.
  """

  def __init__(self, spec, rule=ranges.Search(), regularization=0.01):  # noqa: B008  A frozen value.
    neighbours.check(type(self).__name__, spec)
    self.spec, self.rule, self.regularization = spec, rule, regularization
    self.V, self.scale, self.zero, self.offset = (nnx.data(None) for _ in range(4))

  def for_weight(self, w):
    """Starts from round to nearest, with h(V) where the weight lies between its neighbours."""
    q = base.each_matrix(lambda m: qarray.encode(m, self.spec, *self.rule(m, self.spec)), w)
    return self.starting_at(w, q, near=True)

  def starting_at(self, w, q, near=False):
    """The quantizer of w: f32[*lead, in, out] that encodes it as q: QArray[*lead, in, out], on its grid.

    `near`: whether q is known to hold neighbours of w only; then no offset is kept.
    """
    new = type(self)(q.spec, self.rule, self.regularization)
    V, offset = neighbours.over_lead(lambda w, q: start(w, q, near), w.ndim - 2)(w, q)
    new.V, new.offset = base.Rounding(V), None if offset is None else neighbours.Offset(offset)
    new.scale, new.zero = base.Range(q.scale), None if q.zero is None else base.Range(q.zero)
    return new

  def grid(self, x):
    if self.V is None:
      raise self.needs_range()
    return self.scale.get_value(), None if self.zero is None else self.zero.get_value()

  def __call__(self, x):
    """The hard form, with the gradient of the soft one, and that of x where it is not clipped."""
    return base.straight_through(self.soft(x), qarray.decode(self.encode(x), x.dtype))

  def encode(self, x):
    low, high, *_ = self.neighbours(x)
    level = jnp.where(self.V[...] > 0, high, low)
    return qarray.QArray(self.spec.format.encode(level), *self.grid(x), self.spec)

  def soft(self, x):
    """The weight at h(V): float[*shape]."""
    low, high, *_ = self.neighbours(x)
    y = neighbours.numbers(soft(self.V[...], low, high), self.spec, *self.grid(x), x.dtype)
    return y + neighbours.only_gradient(jnp.where(high > low, x, jnp.zeros_like(x)))

  def neighbours(self, x):
    offset = None if self.offset is None else self.offset[...]
    return neighbours.between(jax.lax.stop_gradient(x), self.spec, *self.grid(x), offset)

  def relaxed(self):
    return self._as(SoftAdaRound)

  def _as(self, cls):
    """The same variables under another class."""
    new = cls(self.spec, self.rule, self.regularization)
    new.V, new.offset, new.scale, new.zero = self.V, self.offset, self.scale, self.zero
    return new

  def frozen(self):
    return neighbours.without_params(self.settled())


class SoftAdaRound(AdaRound):
  """What stands for AdaRound while it is trained: the weight moves between its neighbours without jumps."""

  def __call__(self, x):
    return self.soft(x)

  def encode(self, x):
    """On a grid that holds what lies between the levels: nothing takes it for codes."""
    low, high, *_ = self.neighbours(x)
    return neighbours.between_levels(soft(self.V[...], low, high), self.spec, *self.grid(x))

  def relaxed(self):
    return self

  def settled(self):
    return self._as(AdaRound)

  def penalty(self, progress):
    """lambda times the regularizer, and none during the warmup."""
    beta = annealed(progress)
    return jnp.where(progress < WARMUP, 0, self.regularization * regularizer(self.V[...], beta))

  def harden(self, share):
    """Fixes, in place, the `share` of all V whose h is nearest to 0 or 1."""
    self.V[...] = harden(self.V[...], share)


def start(w, q, near):
  """V[i, o] and offset[i, o] (or None) at which w[i, o] is rounded to the codes of q."""
  value, offset = q.spec.format.decode(q.codes), None
  if not near and isinstance(q.spec.format, formats.Int):
    low, high, *_ = neighbours.between(w, q.spec, q.scale, q.zero)
    offset = neighbours.offset_to(q, w, (value == low) | (value == high))
  low, high, fraction, nearest_is_high = neighbours.between(w, q.spec, q.scale, q.zero, offset)
  up = jnp.where(high > low, value >= high, nearest_is_high)
  side = jnp.where(up, jnp.where(fraction > 0.5, fraction, 0.5 + MARGIN),
                   jnp.where(fraction < 0.5, fraction, 0.5 - MARGIN))
  return h_inverse(side), offset


FAR = 30.0  # h is 0 or 1 beyond log(11) = 2.4, and no step of an optimizer comes back from here.


def harden(V: Float[Array, '*shape'], share) -> Float[Array, '*shape']:
  """TesseraQ's progressive rounding: the `share` of V with the largest |h(V) - 0.5| is fixed where it is.

  Li and Panda. TesseraQ: Ultra Low-Bit LLM Post-Training Quantization with Block Reconstruction, 2024,
  Sec. 3.2. https://arxiv.org/abs/2410.19103. Difference from the paper: shares of each weight matrix,
  where the paper's are of all weights of the block.
  """
  least = jnp.quantile(jnp.abs(V), jnp.clip(1 - share, 0, 1))
  return jnp.where(jnp.abs(V) >= least, jnp.where(V > 0, FAR, -FAR), V)
