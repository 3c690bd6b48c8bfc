"""HQQ: the zero of each block for which most numbers are nearly exact and a few may be far off.

Badri & Shaji. Half-Quadratic Quantization of Large Machine Learning Models, 2023.
https://mobiusml.github.io/hqq_blog/

min_z phi(W - Q_z^-1(Q_z(W))), phi = sum |.|^p, p < 1, is split into two steps that take turns: the error W_e is what
shrinkage leaves of W - W_r, and the zero is the mean of W_q - (W - W_e) / s. It needs no inputs.

Differences from the paper: it early-stops when the mean error of the tensor grows, where here each block keeps the best
of all iterations, the start among them; a zero that has a grid is judged on it; a Min is solved for likewise, in units
of the numbers; a grid without zeros has the least-squares scale, <W_q, W - W_e> / <W_q, W_q>, in its place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import blocks, qarray
from qat.ptq import rtn, scales


@dataclasses.dataclass(frozen=True)
class Settings:
  """The authors' values."""
  p: float = 0.7
  beta: float = 10.0
  kappa: float = 1.01
  iterations: int = 20


@functools.partial(jax.jit, static_argnames=('spec', 'settings'))
def hqq(w, spec, scale=None, zero=None, settings=Settings()):
  """Codes of `w` under zeros that nearly minimize sum |w - w_hat|^p.

  Args:
    w: f32[*shape].
    spec: the grid.
    scale, zero: [*shape / block], where it starts; the smallest that clip nothing if not given.
    settings: of the iteration.

  Returns:
    QArray[*shape], on no block worse than where it started, rounded to nearest.
  """
  w = w.astype(jnp.float32)
  scale, zero = rtn.place(w, spec, scale, zero)
  if spec.block is None:
    return qarray.encode(w, spec)
  solve = _scale if spec.zero is None else _zero
  place = ((lambda t: (scales.like(t, scale), None)) if spec.zero is None else
           (lambda t: (scale, scales.like(t, zero))))
  points = lambda t: rtn.points(*place(t), spec, w.shape)
  error = lambda t: blocks.over_blocks(jnp.sum, jnp.abs(w - points(t).round(w)) ** settings.p, spec.block)

  def iterate(state, beta):
    t, best, least = state
    now = points(t)
    value = spec.format.round(now.units(w))
    kept = w - shrink(w - now.round(w), settings.p, beta)
    t = solve(value, kept, now.scale, spec)
    loss = error(t)
    return (t, jnp.where(loss < least, t, best), jnp.minimum(loss, least)), None

  start = qarray.decode(scale if spec.zero is None else zero)
  betas = np.float32(settings.beta * settings.kappa ** np.arange(settings.iterations))
  (_, best, _), _ = jax.lax.scan(iterate, (start, start, error(start)), betas)
  return qarray.encode(w, spec, *place(best))


def shrink(x, p, beta):
  """argmin_e |e|^p + beta / 2 (e - x)^2, nearly: sign(x) max(|x| - |x|^(p - 1) / beta, 0)."""
  return jnp.sign(x) * jnp.maximum(jnp.abs(x) - jnp.abs(x) ** (p - 1) / beta, 0)


def _zero(value, kept, scale, spec):
  """The zero of each block whose squared distance to `kept` is least."""
  if isinstance(spec.zero, qarray.Min):
    return blocks.over_blocks(blocks.mean, qarray.exact(kept - qarray.exact(scale * value)), spec.block)
  units = qarray.exact(kept * qarray.reciprocal(scale))
  return blocks.over_blocks(blocks.mean, qarray.exact(value - units), spec.block)


def _scale(value, kept, scale, spec):
  """Likewise the scale."""
  along = blocks.over_blocks(blocks.mean, qarray.exact(value * kept), spec.block)
  return along * qarray.reciprocal(blocks.over_blocks(blocks.mean, value * value, spec.block))
