"""Qronos: round a weight so that it also makes up for the errors of the layers before it.

Zhang et al. Qronos: Correcting the Past by Shaping the Future in Post-Training Quantization, 2025.
https://arxiv.org/abs/2505.11695

Calibration gives two inputs of the layer: X of the float model, and X~ of the quantized one, which is what the rounded
weight will be fed. It minimizes |X w - X~ w_hat|^2. Row by row: a row is rounded at the best number for it while the
rows below are as they were, and then the rows below become the best for what has been rounded. After the first row the
rest is already a least-squares solution, and each step is one of GPTQ.

Differences from the paper: H = X~^T X~ is damped as in GPTQ, and X~^T X with it, so that X~ = X gives GPTQ's codes;
GPTQ's steps are those of LDLQ, which are the same; where the result is no better than rounding to nearest, for an
output, that output is rounded to nearest.
"""

import functools

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.ptq import hessian, ldlq, rtn


@functools.partial(jax.jit, static_argnames='spec')
def qronos(w, factor, G, spec, scale=None, zero=None):
  """Codes of `w` that nearly minimize the mean of |X w - X~ w_hat|^2.

  Args:
    w: f32[i, o].
    factor: of H, the mean of x~^T x~ over the n rows of X~: `hessian.factor(X~^T X~ / n)`.
    G: f32[i, i], the mean of x~^T x: X~^T X / n.
    spec: the grid of the codes.
    scale, zero: [i, o] / block; the smallest that clip nothing if not given.

  Returns:
    QArray[i, o].
  """
  hessian.check(w, factor.H)
  scale, zero = rtn.place(w, spec, scale, zero)
  points = rtn.points(scale, zero, spec, w.shape)
  w = factor.live(w)
  dot = functools.partial(jnp.matmul, precision=hessian.HIGHEST)
  drift = dot(G - factor.H, w)                                             # X~^T (X - X~) w
  in_order = lambda a: a[factor.order]
  v, shift = in_order(w), in_order(drift)
  best = v + _solve(factor.R, shift)                                       # H^-1 X~^T X w
  # The first row's best number while the rows below are still w: (X~^T X w)_0 - sum_{j>0} H_0j w_j, over H_00.
  first = v[0] + shift[0] / jnp.sum(factor.R[0] ** 2)
  M = factor.R / jnp.diag(factor.R)[None]
  units = ldlq.feedback(best.at[0].set(first), best, M, jax.tree.map(in_order, points))
  units = jnp.zeros_like(units).at[factor.order].set(units)
  others = points.units(w)

  def error(units):                                                        # |X w - X~ w_hat|^2 - |X w - X~ w|^2
    step = points.numbers(units) - w
    return jnp.sum(step * (dot(factor.H, step) - 2 * drift), axis=0)

  units = jnp.where((error(units) < error(others))[None], units, others)
  return qarray.QArray(spec.format.encode(units), scale, zero, spec)


def _solve(R, b):
  """H^-1 b for H = R R^T."""
  half = jax.scipy.linalg.solve_triangular(R, b)
  return jax.scipy.linalg.solve_triangular(R, half, trans='T')
