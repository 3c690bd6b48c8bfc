"""FlexRound: learn what each weight is divided by before it is rounded.

Lee et al. FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization, ICML 2023.
https://arxiv.org/abs/2306.00317
Names are the paper's: s1 is the step; S2 has a divisor for each weight, s3 one for each output.

A divisor moves a weight by an amount in proportion to its size, so large weights, which matter more, may go
further than to their neighbours (Proposition 3.1).

Differences from the paper: S2 and s3 are the exponentials of what is learned, and so stay positive; any format
and block; the zero is that of the range rule, and is not learned.
"""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import qarray, ranges
from qat.quantizers import base, neighbours


def flexround(W: Float[Array, 'i o'], s1: Float[Array, '*blocks'], S2: Float[Array, 'i o'], s3: Float[Array, '1 o'],
              spec: qarray.Spec, zero=None) -> Float[Array, 'i o']:
  """s1 round(W / (s1 S2 s3))  (Eq. 2), clipped, with straight-through gradients by all of them."""
  (s1, zero), _ = neighbours.placed(s1, zero, spec)
  return neighbours.on_grid(divided(W, S2, s3), spec, s1, zero)


def divided(W, S2, s3):
  """W / (S2 s3), which is what is rounded to the grid of s1: float[i, o]."""
  return (W.astype(jnp.float32) * qarray.exact(1 / (S2 * s3))).astype(W.dtype)


class FlexRound(base.Quantizer):

  def __init__(self, spec, rule=ranges.Search()):  # noqa: B008  A frozen value.
    neighbours.check('FlexRound', spec)
    self.spec, self.rule = spec, rule
    self.s1, self.log_S2, self.log_s3, self.zero = (nnx.data(None) for _ in range(4))

  def for_weight(self, w):
    """Starts from round to nearest: S2 = s3 = 1."""
    return self.starting_at(w, *base.each_matrix(lambda matrix: self.rule(matrix, self.spec), w))

  def starting_at(self, w, scale, zero=None):
    """The quantizer of w: f32[*lead, in, out] whose step starts at `scale`: f32[*lead, *blocks] or QArray."""
    new = FlexRound(self.spec, self.rule)
    scale, zero = neighbours.floats(w.ndim - 2, scale, zero)
    new.s1, new.zero = base.StepSize(scale), None if zero is None else base.Range(zero)
    new.log_S2 = base.Rounding(jnp.zeros(w.shape, jnp.float32))
    new.log_s3 = base.Rounding(jnp.zeros((*w.shape[:-2], 1, w.shape[-1]), jnp.float32))
    return new

  def _parts(self):
    """s1, S2, s3 and the zero."""
    if self.s1 is None:
      raise self.needs_range()
    return self.s1[...], jnp.exp(self.log_S2[...]), jnp.exp(self.log_s3[...]), self.zero and self.zero[...]

  def grid(self, x):
    s1, *_, zero = self._parts()
    return neighbours.placed(s1, zero, self.spec)[1]

  def prepare(self, x):
    _, S2, s3, _ = self._parts()
    return divided(x, S2, s3)

  def __call__(self, x):
    s1, S2, s3, zero = self._parts()
    return flexround(x, s1, S2, s3, self.spec, zero)

  def frozen(self):
    return neighbours.without_params(self)
