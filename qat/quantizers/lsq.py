"""Learned step size quantization.

Esser et al. Learned Step Size Quantization, ICLR 2020. https://arxiv.org/abs/1902.08153
Names are the paper's: v is the input, s the step, Q_N and Q_P the clip points.

Differences from the paper: a step for each block of the Spec, where the paper has one a layer; any
format, of which integers are the paper's; |s| is used, so that a step cannot turn negative; the
activations' steps start from the first batches of `calibrate`, as the weights' do from the weights.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, observers, qarray, ranges
from qat.quantizers import base, static

MEAN_ABS = observers.MeanAbs()


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def lsq(v: Float[Array, '*shape'], s: Float[Array, '*blocks'], spec: qarray.Spec,
        gradient_scale: float) -> Float[Array, '*shape']:
  """Rounds `v` to the grid of step `s` (Eqs. 1-2), with the gradients of Sec. 2.1.

  Args:
    v: float[*shape].
    s: f32[*shape / block], in units of v.
    spec: the grid.
    gradient_scale: g, what multiplies the gradient of s (Sec. 2.2).

  Returns:
    [*shape], the multiples of each block's step, in the dtype of v.
  """
  return qarray.fake(v, spec, s)


@lsq.defjvp
def _lsq_jvp(spec, gradient_scale, primals, tangents):
  (v, s), (dv, ds) = primals, tangents
  out = lsq(v, s, spec, gradient_scale)
  s = qarray.decode(qarray.place(v, spec, s)[0])  # The step on its own grid, if it has one.
  spread = lambda a: blocks.spread(a, spec.block, v.shape)
  u = v.astype(jnp.float32) * spread(qarray.reciprocal(s))
  value = spec.format.round(u)
  within = (spec.format.min <= u) & (u <= spec.format.max)
  slope = value - jnp.where(within, u, jnp.zeros_like(u))                   # Eq. (3)
  from_v = jnp.where(within, dv, jnp.zeros_like(dv))                        # Eq. (5)
  from_s = (spread(ds) * slope * gradient_scale).astype(v.dtype)
  return out, from_v + from_s


def paper_gradient_scale(v_size, s_size, spec):
  """g = 1 / sqrt(N Q_P), N numbers a step (Sec. 2.2)."""
  return 1 / math.sqrt(v_size / s_size * spec.format.max)


def by_numbers(v_size, s_size, spec):
  """g = 1 / sqrt(N), of the paper's ablation."""
  return 1 / math.sqrt(v_size / s_size)


def unscaled(v_size, s_size, spec):
  """g = 1, of the paper's ablation."""
  return 1.0


class LSQ(base.Quantizer):

  def __init__(self, spec, rule=ranges.lsq_init, observer=MEAN_ABS, unsigned=None, gradient_scale=paper_gradient_scale):
    """`unsigned`: the Spec to use instead if calibration sees no negative number; `gradient_scale`: g, a function."""
    if spec.zero is not None:
      raise ValueError(f'LSQ({spec}): the spec has a zero, and LSQ learns a scale alone. '
                       'Drop the zero, or use Static.')
    self.spec, self.rule, self.observer, self.unsigned = spec, rule, observer, unsigned
    self.gradient_scale, self.s = gradient_scale, nnx.data(None)

  def _start(self, scale):
    new = LSQ(self.spec, self.rule, observer=None, gradient_scale=self.gradient_scale)
    new.s = base.StepSize(qarray.decode(scale))
    return new

  def for_weight(self, w):
    return self._start(base.each_matrix(lambda matrix: self.rule(matrix, self.spec)[0], w))

  def for_input(self, lead, scale=None, zero=None):
    return self._start(scale)

  def with_spec(self, spec):
    return LSQ(spec, self.rule, self.observer, gradient_scale=self.gradient_scale)

  def grid(self, x):
    if self.s is None:
      raise self.needs_range()
    return qarray.apart(jnp.abs(base.to_rank(self.s[...], x.ndim, self.spec.block))), None

  def __call__(self, x):
    s, _ = self.grid(x)
    return lsq(x, s, self.spec, self.gradient_scale(x.size, s.size, self.spec))

  def frozen(self):
    return static.Static.at(self.spec, jnp.abs(self.s[...]))
