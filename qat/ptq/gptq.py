"""GPTQ: round a weight row by row, each row absorbing the error of those before it.

Frantar et al. GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023.
https://arxiv.org/abs/2210.17323

Act-order (rows of large H_ii first) and static groups are of the authors' code, https://github.com/IST-DASLab/gptq.

Differences from the paper and its code: scales are always fixed before the loop, from the original weight; U comes
from one Cholesky factorization, H = R R^T with R upper, U = R^-1, which is that of H^-1 with no inverse of H in
between; where the result is no better than rounding to nearest, for an output, that output is rounded to nearest.
"""

import functools
import warnings

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.ptq import hessian, rtn

BLOCK = 128  # rows between lazy updates (the paper's B)


def gptq(w, H, spec, scale=None, zero=None, damp=0.01, act_order=False):
  """Codes of `w` that nearly minimize the error of its outputs, tr(dW^T H dW).

  Args:
    w: f32[i, o], a kernel: y = x @ w.
    H: f32[i, i], the mean of x^T x over the calibration inputs.
    spec: the grid of the codes.
    scale, zero: [i, o] / block, put on the grid's own grids; the smallest that clip nothing if not given.
    damp: added to H's diagonal, as a fraction of its mean. Grows tenfold, with a warning, until H has a factor; if that
      never happens `w` is rounded to nearest.
    act_order: whether rows are rounded in the order of their H_ii, largest first.

  Returns:
    QArray[i, o], on no output worse than rounding to nearest.

  >>> from qat.core import specs
  >>> w, x = jax.random.normal(jax.random.key(0), (8, 4)), jnp.tril(jnp.ones((8, 8)))
  >>> spec = specs.integer(4, (None, 1))
  >>> error = lambda q: float(jnp.linalg.norm(x @ (qarray.decode(q) - w)))
  >>> error(gptq(w, x.T @ x / 8, spec)) < 0.6 * error(qarray.encode(w, spec))
  True
  """
  factor = hessian.factor(H, damp, act_order)
  if not isinstance(factor.damp, jax.core.Tracer):
    fallback = hessian.notes(factor, damp).get('fallback')
    if fallback:
      warnings.warn(f'GPTQ of a weight of shape {w.shape} {fallback}.', stacklevel=2)
  return walk(w, factor, spec, scale, zero)


@functools.partial(jax.jit, static_argnames='spec')
def walk(w, factor, spec, scale=None, zero=None):
  """GPTQ's loop, for a factor of H: QArray[i, o]."""
  hessian.check(w, factor.H)
  scale, zero = rtn.place(w, spec, scale, zero)
  points = rtn.points(scale, zero, spec, w.shape)
  w = factor.live(w)
  U = jax.scipy.linalg.solve_triangular(factor.R, jnp.eye(len(w)))         # U^T U = H^-1
  in_order = lambda a: a[factor.order]
  units = round_rows(in_order(w), U, jax.tree.map(in_order, points))
  units = jnp.zeros_like(units).at[factor.order].set(units)
  units = keep_better(w, factor.H, points, units, points.units(w))
  return qarray.QArray(spec.format.encode(units), scale, zero, spec)


def round_rows(w, U, points):
  """The numbers that GPTQ rounds, in units of the format.

  Args:
    w: f32[i, o], rows in the order in which they are rounded.
    U: f32[i, i], upper.
    points: the grid of each number of w.

  Returns:
    f32[i, o], to be encoded.
  """
  i, o = w.shape
  short = -i % BLOCK
  pad = lambda a: jnp.pad(a, [(0, short), (0, 0)])
  split = lambda a: a.reshape(-1, BLOCK, *a.shape[1:])
  U = jnp.pad(U, [(0, short)] * 2) + jnp.diag(jnp.arange(i + short) >= i).astype(U.dtype)
  points = jax.tree.map(lambda a: split(pad(a)), points)                   # f32[i / B, B, o]

  def row(w, given):
    k, u, points = given                                                   # u: f32[B], row k of U within the block
    units = points.units(w[k])
    error = (w[k] - points.numbers(units)) / u[k]
    return w - u[:, None] * error[None], (units, error)                    # U is upper: only rows below absorb.

  def block(w, given):
    start, U, points = given                                               # U: f32[B, i]
    mine = jax.lax.dynamic_slice_in_dim(w, start, BLOCK)
    within = jax.lax.dynamic_slice_in_dim(U, start, BLOCK, axis=1)
    _, (units, errors) = jax.lax.scan(row, mine, (jnp.arange(BLOCK), within, points))
    return w - jnp.matmul(U.T, errors, precision=hessian.HIGHEST), units   # the lazy update

  starts = jnp.arange(0, i + short, BLOCK)
  _, units = jax.lax.scan(block, pad(w), (starts, split(U), points))
  return units.reshape(-1, o)[:i]


def keep_better(w, H, points, units, others):
  """Of two choices of units, the one with the smaller error on each output: f32[i, o]; of equals `others`."""
  error = lambda units: hessian.objective(points.numbers(units) - w, H)
  return jnp.where((error(units) < error(others))[None], units, others)
