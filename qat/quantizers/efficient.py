"""A learned step and a learned zero: the quantizer of EfficientQAT, which trains them together with the weights.

Chen et al. EfficientQAT: Efficient Quantization-Aware Training for Large Language Models, ACL 2025.
https://arxiv.org/abs/2407.11062
Names are the paper's: s is the step and z the zero point; all gradients are straight-through (Eqs. 3-5).

It is LSQ with a zero, and without LSQ's gradient scale g. Its first phase, Block-AP, is ptq.reconstruct with the
weights among what is learned (ptq/presets.py); the second trains StepSize variables alone.

Differences from the paper: any format and block; |s| is used, so that a step cannot turn negative (the authors' code
clips it at 1e-4).
"""

from flax import nnx
import jax.numpy as jnp

from qat.core import qarray
from qat.quantizers import base, neighbours


def learned_grid(w, s, z, spec):
  """s (clip(round(w / s) + round(z), 0, 2^N - 1) - round(z))  (Eqs. 1-2), with gradients by w, s and z.

  Args:
    w: float[i, o].
    s, z: f32[*blocks]; z is None for a spec without a zero.
    spec: the grid.
  """
  return neighbours.on_grid(w, spec, *neighbours.placed(s, z, spec)[0])


class LearnedGrid(base.Quantizer):

  def __init__(self, spec, rule=qarray.absmax):
    neighbours.check('LearnedGrid', spec)
    self.spec, self.rule = spec, rule
    self.s, self.z = nnx.data(None), nnx.data(None)

  def for_weight(self, w):
    """Starts from round to nearest on the rule's grid."""
    return self.starting_at(w, *base.each_matrix(lambda matrix: self.rule(matrix, self.spec), w))

  def starting_at(self, w, scale, zero=None):
    """The quantizer of w: f32[*lead, in, out] whose grid starts at these: f32[*lead, *blocks] or QArrays."""
    new = LearnedGrid(self.spec, self.rule)
    scale, zero = neighbours.floats(w.ndim - 2, scale, zero)
    new.s, new.z = base.StepSize(scale), None if zero is None else base.StepSize(jnp.broadcast_to(zero, scale.shape))
    return new

  def _learned(self):
    if self.s is None:
      raise self.needs_range()
    return jnp.abs(self.s[...]), None if self.z is None else self.z[...]

  def grid(self, x):
    return neighbours.placed(*self._learned(), self.spec)[1]

  def __call__(self, x):
    return learned_grid(x, *self._learned(), self.spec)

  def frozen(self):
    return neighbours.without_params(self)
