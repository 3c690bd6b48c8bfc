"""LDLQ: round a weight row by row, with linear feedback of the errors made so far.

Chee et al. QuIP: 2-Bit Quantization of Large Language Models With Guarantees, NeurIPS 2023, Sec. 3.
https://arxiv.org/abs/2307.13304

H = (M + I) D (M + I)^T with M strictly upper: row k is rounded at w_k + sum_{j<k} M_jk (w_j - w_hat_j). Among all
feedbacks this M is the best in the worst case and on average (Theorem 1), and gives GPTQ's codes (Theorem 6).

Differences from the paper: kernels are [in, out], so its rows are our columns; H is damped as in GPTQ; where the result
is no better than rounding to nearest, for an output, that output is rounded to nearest. Incoherence: incoherence.py.
"""

import functools

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.ptq import gptq, hessian, rtn


@functools.partial(jax.jit, static_argnames='spec')
def ldlq(w, factor, spec, scale=None, zero=None):
  """Codes of `w` that nearly minimize tr(dW^T H dW).

  Args:
    w: f32[i, o].
    factor: of H, by `hessian.factor`; it has the order of the rows.
    spec: the grid of the codes.
    scale, zero: [i, o] / block; the smallest that clip nothing if not given.

  Returns:
    QArray[i, o].
  """
  hessian.check(w, factor.H)
  scale, zero = rtn.place(w, spec, scale, zero)
  points = rtn.points(scale, zero, spec, w.shape)
  w = factor.live(w)
  M = factor.R / jnp.diag(factor.R)[None]                                  # M + I: its diagonal is not read.
  in_order = lambda a: a[factor.order]
  units = feedback(in_order(w), in_order(w), M, jax.tree.map(in_order, points))
  units = jnp.zeros_like(units).at[factor.order].set(units)
  units = gptq.keep_better(w, factor.H, points, units, points.units(w))
  return qarray.QArray(spec.format.encode(units), scale, zero, spec)


def feedback(base, anchor, M, points):
  """Rounds row k of f32[i, o] at base_k + sum_{j<k} M_jk (anchor_j - w_hat_j), one after the other.

  Args:
    base, anchor: f32[i, o].
    M: f32[i, i], of which only the part above the diagonal is read.
    points: the grid of each number.

  Returns:
    f32[i, o], in units of the format, to be encoded.
  """
  i, o = base.shape
  short = -i % gptq.BLOCK
  split = lambda a: jnp.pad(a, [(0, short), (0, 0)]).reshape(-1, gptq.BLOCK, a.shape[1])
  M = jnp.triu(jnp.pad(M, [(0, short)] * 2), 1)

  def row(errors, given):
    k, m, base, anchor, points = given                                     # m: f32[B], column k of M within the block
    units = points.units(base + jnp.matmul(m, errors, precision=hessian.HIGHEST))
    return errors.at[k].set(anchor - points.numbers(units)), units

  def block(total, given):
    start, M, base, anchor, points = given                                 # M: f32[B, i]
    within = jax.lax.dynamic_slice_in_dim(M, start, gptq.BLOCK, axis=1)
    base = base + jax.lax.dynamic_slice_in_dim(total, start, gptq.BLOCK)
    rows = jnp.arange(gptq.BLOCK), within.T, base, anchor, points
    errors, units = jax.lax.scan(row, jnp.zeros_like(base), rows)
    return total + jnp.matmul(M.T, errors, precision=hessian.HIGHEST), units

  blocks = (jnp.arange(0, i + short, gptq.BLOCK), M.reshape(-1, gptq.BLOCK, i + short), split(base), split(anchor),
            jax.tree.map(split, points))
  _, units = jax.lax.scan(block, jnp.zeros((i + short, o)), blocks)
  return units.reshape(-1, o)[:i]
