"""SignRound, which AutoRound's software made known: learn an offset before rounding, and the ends of the range.

Cheng et al. Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023.
https://arxiv.org/abs/2309.05516
Names are the paper's: V in [-0.5, 0.5] is added to the weight in units of its step; alpha and beta in [0, 1] are
what max(W) and min(W) are multiplied by.

Differences from the paper: any format: V counts in gaps between the neighbouring levels; the range is that of any
range rule, and one factor serves both of its ends where there is no zero; it may start from given codes.
Train it with optax.sign_sgd (ptq/presets.py).
"""

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import formats, qarray
from qat.quantizers import base, neighbours


def signround(w, V, alpha, beta, spec, scale, zero, offset=None):
  """clip(round(W / s + V + zp), n, m), the range's ends scaled by alpha and beta  (Eqs. 2-4).

  Gradients go straight through the rounding, to w, V, alpha and beta.

  Args:
    w: float[i, o].
    V: f32[i, o].
    alpha, beta: f32[*blocks], of the upper and the lower end; beta is None without a zero.
    spec: the grid.
    scale, zero: f32[*blocks], those of alpha = beta = 1.
    offset: f32[i, o], whole levels to add, or None.

  Returns:
    the level of each weight, f32[i, o], and the scale and the zero, both as f32 and as `encode` takes them.
  """
  V = neighbours.bounded(V, -0.5, 0.5)
  alpha = neighbours.bounded(alpha, 0.0, 1.0)
  beta = None if beta is None else neighbours.bounded(beta, 0.0, 1.0)
  soft, hard = neighbours.placed(*neighbours.rescaled(scale, zero, spec, beta, alpha), spec)
  low, high, fraction, nearest_is_high = jax.lax.stop_gradient(neighbours.between(w, spec, *hard, offset))
  up = jnp.where(fraction + V == 0.5, nearest_is_high, fraction + V > 0.5)
  u = qarray.units(w, spec, *soft, neighbours.straight_half_even)
  moved = jnp.where(high > low, u, jnp.zeros_like(u)) + V * (high - low)  # Its gradient is that of the level.
  return base.straight_through(moved, jnp.where(up, high, low)), soft, hard


class SignRound(base.Quantizer):

  def __init__(self, spec, rule=qarray.absmax):
    neighbours.check('SignRound', spec)
    self.spec, self.rule = spec, rule
    self.V, self.alpha, self.beta, self.scale, self.zero, self.offset = (nnx.data(None) for _ in range(6))

  def for_weight(self, w):
    """Starts from round to nearest: V = 0 and whole ranges."""
    return self._at(w, *base.each_matrix(lambda matrix: self.rule(matrix, self.spec), w))

  def starting_at(self, w, q):
    """The quantizer of w: f32[*lead, in, out] that encodes it as q: QArray[*lead, in, out], on its grid."""
    if not isinstance(q.spec.format, formats.Int):
      raise ValueError(f'SignRound starting at codes of {q.spec}: whole levels are added to a weight to reach its '
                       'code, and the levels of the format are not evenly spaced. Start from the weight, or use '
                       'AdaRound.')
    new = SignRound(q.spec, self.rule)._at(w, q.scale, q.zero)
    new.offset = neighbours.Offset(neighbours.over_lead(_offset, w.ndim - 2)(w, q))
    return new

  def _at(self, w, scale, zero):
    new = SignRound(self.spec, self.rule)
    scale, zero = neighbours.floats(w.ndim - 2, scale, zero)
    new.scale, new.zero = base.Range(scale), None if zero is None else base.Range(zero)
    new.V = base.Rounding(jnp.zeros(w.shape, jnp.float32))
    new.alpha = base.StepSize(jnp.ones_like(scale))
    new.beta = None if zero is None else base.StepSize(jnp.ones_like(scale))
    return new

  def _level(self, x):
    if self.V is None:
      raise self.needs_range()
    read = lambda v: None if v is None else v[...]
    return signround(x, self.V[...], self.alpha[...], read(self.beta), self.spec, self.scale[...], read(self.zero),
                     read(self.offset))

  def grid(self, x):
    return self._level(x)[2]

  def __call__(self, x):
    level, soft, _ = self._level(x)
    return neighbours.numbers(level, self.spec, *soft, x.dtype)

  def encode(self, x):
    level, _, hard = self._level(x)
    return qarray.QArray(self.spec.format.encode(level), *hard, self.spec)

  def frozen(self):
    return neighbours.without_params(self)


def _offset(w, q):
  nearest = neighbours.between(w, q.spec, q.scale, q.zero).nearest
  return neighbours.offset_to(q, w, nearest == q.spec.format.decode(q.codes))
