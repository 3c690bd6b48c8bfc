"""PACT: activations clipped at a learned level.

Choi et al. PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018.
https://arxiv.org/abs/1805.06085. alpha is the clip level; y = clip(x, 0, alpha) is rounded to k bits.

The paper's L2 penalty on alpha is the optimizer's weight decay on StepSize variables.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import formats, qarray
from qat.quantizers import base, static


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def pact(x: Float[Array, '*shape'], alpha: Float[Array, '*ones'], spec: qarray.Spec) -> Float[Array, '*shape']:
  """round(clip(x, 0, alpha) (2^k - 1) / alpha) alpha / (2^k - 1)  (Eqs. 1-2).

  Args:
    x: float[*shape].
    alpha: f32[1, ..., 1].
    spec: unsigned integers of k bits.
  """
  return qarray.fake(x, spec, step(alpha, spec))


@pact.defjvp
def _pact_jvp(spec, primals, tangents):
  (x, alpha), (dx, dalpha) = primals, tangents
  above = x.astype(jnp.float32) >= jnp.broadcast_to(alpha, x.shape)
  from_x = jnp.where((x > 0) & ~above, dx, jnp.zeros_like(dx))              # Eq. (3)
  from_alpha = jnp.where(above, jnp.broadcast_to(dalpha, x.shape), jnp.zeros(x.shape, dalpha.dtype))
  return pact(x, alpha, spec), from_x + from_alpha.astype(x.dtype)


def step(alpha, spec):
  return qarray.divide(alpha, spec.format.max)


class PACT(base.Quantizer):
  """One alpha for the tensor. For activations that are not negative, as after ReLU."""

  def __init__(self, bits, alpha=10.0):
    """`alpha` starts at 10 (Sec. 5)."""
    self.spec = qarray.Spec(formats.Int(bits, signed=False), (...,))
    self.start = alpha
    self.alpha = base.StepSize(jnp.float32(alpha))

  def for_weight(self, w):
    raise ValueError(f'PACT was given as the quantizer of a weight of shape {w.shape}: it clips at 0, so '
                     'it serves activations only. Use DoReFaWeight or LSQ for the weight.')

  def for_input(self, lead, scale=None, zero=None):
    new = PACT(self.spec.format.bits, self.start)
    new.alpha = base.StepSize(jnp.full(lead, self.start, jnp.float32))
    return new

  def grid(self, x):
    return step(self._alpha(x), self.spec), None

  def _alpha(self, x):
    return base.to_rank(jnp.abs(self.alpha[...]), x.ndim, self.spec.block)

  def __call__(self, x):
    return pact(x, self._alpha(x), self.spec)

  def frozen(self):
    return static.Static.at(self.spec, step(jnp.abs(self.alpha[...]), self.spec))
