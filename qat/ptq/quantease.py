"""QuantEase: better codes by coordinate descent, one number at a time and all others fixed.

Behdin et al. QuantEase: Optimization-based Quantization for Language Models, 2023. https://arxiv.org/abs/2309.01885

tr(dW^T H dW) is a parabola in each number of w_hat, and the best point of its grid is the nearest to the parabola's
bottom, w_hat_k - (H (w_hat - w))_k / H_kk (Lemma 1): no sweep over the rows makes the error larger.

Differences from the paper: it starts from any codes, such as GPTQ's, and not from w; all sweeps keep to the grid.
"""

import functools

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.ptq import gptq, hessian, ldlq, rtn


@functools.partial(jax.jit, static_argnames='sweeps')
def descend(w, H, q, sweeps=4):
  """Other codes for the same scales, with no larger error.

  Args:
    w: f32[i, o].
    H: f32[i, i], whose objective falls. Damp it as for the codes that it starts from.
    q: QArray[i, o], where it starts.
    sweeps: over all rows.

  Returns:
    QArray[i, o].
  """
  hessian.check(w, H)
  w = w.astype(jnp.float32)
  points = rtn.points(q.scale, q.zero, q.spec, w.shape)
  inverse = qarray.reciprocal(jnp.diag(H))                                 # 0 for dead inputs, which stay.
  M = H * inverse[None]

  def sweep(_, units):
    w_hat = points.numbers(units)
    base = w_hat - jnp.matmul(H, w_hat - w, precision=hessian.HIGHEST) * inverse[:, None]
    return gptq.keep_better(w, H, points, ldlq.feedback(base, w_hat, M, points), units)

  units = jax.lax.fori_loop(0, sweeps, sweep, points.units(qarray.decode(q)))
  return qarray.QArray(q.spec.format.encode(units), q.scale, q.zero, q.spec)
