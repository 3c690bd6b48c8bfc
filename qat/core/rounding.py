"""Rounding: how a number between two grid points chooses one of them.

Each rule is a function of `u`, numbers in units of the grid's spacing, and returns whole
numbers of the same dtype. None of them adds to `u` before it is `exact`: the same numbers would
else round one way in one program and another way in the next.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

Arrays = jax.Array | np.ndarray


def exact(x: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """`x`, rounded to its dtype before it is added to anything.

  LLVM contracts a * b + c into one fused multiply-add where it can, and so gives other last bits
  in one program than in another. It does not look through a clamp.
  """
  largest = jnp.finfo(x.dtype).max
  return jnp.clip(x, -largest, largest)


def half_even(u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """IEEE 754's default and the unbiased one: 0.5 -> 0, 1.5 -> 2, -2.5 -> -2."""
  return jax.lax.round(u, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def half_away(u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """C's `round`, LiteRT and GGUF's Q8_0: 0.5 -> 1, -0.5 -> -1."""
  u = exact(u)
  whole = jnp.trunc(u)
  return whole + jnp.where(jnp.abs(u - whole) >= 0.5, jnp.sign(u), jnp.zeros_like(u))


def half_up(u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """floor(u + 1/2): 0.5 -> 1, -0.5 -> 0."""
  nearest = half_even(u)
  return jnp.where(u - nearest == 0.5, nearest + 1, nearest)


def floor(u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """Towards minus infinity."""
  return jnp.floor(u)


def ceil(u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """Towards plus infinity."""
  return jnp.ceil(u)


def truncate(u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
  """Towards zero."""
  return jnp.trunc(u)


@dataclasses.dataclass(frozen=True, eq=False)
class Stochastic:
  """Up with the probability of the fraction, so that the mean of the result is `u`.

  Gupta et al. Deep Learning with Limited Numerical Precision, ICML 2015.
  https://arxiv.org/abs/1502.02551

  The key is used once: the same object draws the same numbers for the same shape.
  """
  key: jax.Array

  def __call__(self, u: Float[Arrays, '*shape']) -> Float[Array, '*shape']:
    u = exact(u)
    whole = jnp.floor(u)
    draw = jax.random.uniform(self.key, u.shape, u.dtype)
    return whole + (draw < u - whole).astype(u.dtype)
