"""Dense and sparse: the numbers that rounding hurts most stay in floats, and the rest is rounded without them.

Dettmers et al. SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression, ICLR 2024.
https://arxiv.org/abs/2306.03078

The sensitivity of a number is the increase of the output error when it is rounded and all others are then chosen anew,
(w - w_hat)^2 / [H^-1]_ii (Eq. 2, after Optimal Brain Surgeon). Outliers are left out of the ranges, and their errors in
GPTQ's loop are 0.

Differences from the paper: outliers are a share of all numbers, and not those above a threshold; sensitivities are
those of rounding under scales that outliers have a part in; scales and their grids are those of the Spec.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qat.core import qarray, ranges
from qat.ptq import gptq, hessian, rtn, scales

VALUE_BITS, COLUMN_BITS, POINTER_BITS = 16, 16, 32  # compressed rows, Sec. 4.2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseAndSparse:
  """A QArray, and numbers that stand in place of some of its own.

  Attributes:
    dense: QArray[i, o]; at the places of the others it is as near to 0 as the grid allows.
    rows, columns: i32[n], in the order of the rows.
    values: f16[n].
  """
  dense: qarray.QArray
  rows: Any
  columns: Any
  values: Any

  def decode(self):
    """f32[i, o]."""
    return qarray.decode(self.dense).at[self.rows, self.columns].set(self.values.astype(jnp.float32))

  @property
  def nbits(self):
    """Bits of storage, indices included."""
    return (self.dense.nbits + (VALUE_BITS + COLUMN_BITS) * self.values.size
            + POINTER_BITS * (self.dense.shape[0] + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
  """The grid of numbers of which some stay what they are, in float16. In place of `rtn.Points` in GPTQ's loop."""
  points: rtn.Points
  apart: Any  # bool[*shape]

  def units(self, x):
    return jnp.where(self.apart, qarray.cast(x, jnp.float16).astype(jnp.float32), self.points.units(x))

  def numbers(self, units):
    return jnp.where(self.apart, units, self.points.numbers(units))


@functools.partial(jax.jit, static_argnames=('spec', 'share', 'rule'))
def spqr(w, factor, spec, share=0.01, rule=ranges.absmax):
  """GPTQ, with a share of the numbers in float16.

  Args:
    w: f32[i, o].
    factor: of H, by `hessian.factor`.
    spec: the grid of the others.
    share: of the numbers, 0 to 1.
    rule: range rule for the others' scales.

  Returns:
    DenseAndSparse, on no output worse than rounding the others to nearest.
  """
  hessian.check(w, factor.H)
  w = factor.live(w)
  U = jax.scipy.linalg.solve_triangular(factor.R, jnp.eye(len(w)))
  inverse = jnp.zeros(len(w)).at[factor.order].set(jnp.sum(U * U, axis=0))  # the diagonal of H^-1
  sensitivity = (w - qarray.fake(w, spec, *scales.fit(rule, w, spec, factor.H))) ** 2 / inverse[:, None]
  places = jnp.sort(jax.lax.top_k(sensitivity.reshape(w.size), round(share * w.size))[1])
  apart = jnp.zeros(w.size, bool).at[places].set(True).reshape(w.shape)
  scale, zero = rtn.place(w, spec, *scales.fit(rule, jnp.where(apart, jnp.zeros_like(w), w), spec, factor.H))
  grid = Apart(rtn.points(scale, zero, spec, w.shape), apart)
  in_order = lambda a: a[factor.order]
  units = gptq.round_rows(in_order(w), U, jax.tree.map(in_order, grid))
  units = jnp.zeros_like(units).at[factor.order].set(units)
  units = gptq.keep_better(w, factor.H, grid, units, grid.units(w))
  rows, columns = jnp.divmod(places, w.shape[1])
  codes = spec.format.encode(jnp.where(apart, grid.points.units(jnp.zeros_like(w)), units))
  return DenseAndSparse(qarray.QArray(codes, scale, zero, spec), rows, columns,
                        units[rows, columns].astype(jnp.float16))
