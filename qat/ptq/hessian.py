"""The Hessian of a layer's output error, and its factors.

With y = x w, the mean squared error of the outputs is tr(dW^T H dW), H the mean of x^T x: f32[i, i]. GPTQ and its kin
need H's inverse, which exists once H is damped, and its triangular factors.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
# Tenfold damping that often: from 0.01 of the mean diagonal to 10,000 times it, where H no longer matters.
TRIES = 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
  """What sequential solvers need to know of H, in the order in which they round.

  Attributes:
    H: f32[i, i], as it was given.
    order: i32[i], the inputs in the order in which they are rounded.
    dead: bool[i], inputs that were always 0: their weights cannot be told from 0.
    R: f32[i, i], upper; R R^T = H[order][:, order] + damp * mean(diag H), with 1 for H_ii of dead inputs. The identity
      if no damping made H positive definite.
    damp: f32[], the damping that was used, as a fraction of the mean diagonal; infinite if none was enough.
    condition: f32[], (max R_ii / min R_ii)^2, a lower bound of the condition number.
  """
  H: jax.Array
  order: jax.Array
  dead: jax.Array
  R: jax.Array
  damp: jax.Array
  condition: jax.Array

  @property
  def ok(self):
    """bool[], whether R stands for H."""
    return jnp.isfinite(self.damp)

  def live(self, w):
    """`w` with the weights of dead inputs at 0: float[i, o] -> f32[i, o]."""
    return jnp.where(self.dead[:, None], jnp.zeros(w.shape), w.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames='act_order')
def factor(H, damp=0.01, act_order=False):
  """Factorizes a damped H; where that fails, with ten times the damping, and so on.

  Args:
    H: f32[i, i].
    damp: added to the diagonal, as a fraction of its mean.
    act_order: whether inputs come in the order of their H_ii, largest first, and not in their own.
  """
  diagonal = jnp.diag(H)
  dead = diagonal == 0
  order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(len(H))
  permuted = jnp.where(dead, jnp.ones_like(H), jnp.zeros_like(H)) * jnp.eye(len(H)) + H
  permuted = permuted[order][:, order]
  unit = jnp.mean(diagonal) * jnp.eye(len(H))

  def attempt(damp):
    return damp, upper_cholesky(permuted + damp * unit)

  def failed(state):
    return ~jnp.all(jnp.isfinite(state[1])) & (state[0] < damp * 10.0 ** (TRIES - 0.5))

  used, R = jax.lax.while_loop(failed, lambda state: attempt(10 * state[0]), attempt(jnp.float32(damp)))
  ok = jnp.all(jnp.isfinite(R)) & ~jnp.all(dead)
  R = jnp.where(ok, R, jnp.eye(len(H)))
  size = jnp.diag(R) ** 2
  return Factor(H, order, dead & ok, R, jnp.where(ok, used, jnp.inf), jnp.max(size) / jnp.min(size))


def check(w, H):
  """Raises unless H: f32[i, i] can be the Hessian of w: f32[i, o]."""
  if w.ndim != 2 or H.shape != (w.shape[0],) * 2:
    raise ValueError(f'A weight of shape {w.shape} and a Hessian of shape {H.shape}: the weight must be a matrix '
                     '[i, o], and the Hessian the mean of x^T x, [i, i]. For kernels [out, in], transpose the weight.')


def upper_cholesky(H):
  """The upper R of H = R R^T: Cholesky from the last row to the first. NaN where H is not positive definite."""
  return jnp.linalg.cholesky(H[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def objective(dw, H):
  """dw^T H dw of each column, the mean squared error of each output: f32[i, o], f32[i, i] -> f32[o]."""
  return jnp.sum(dw * jnp.matmul(H, dw, precision=HIGHEST), axis=0)


def notes(factor, damp):
  """What a coverage report says of a Factor whose damping was to be `damp`: a dict of plain numbers."""
  used, dead, condition = (np.asarray(a) for a in jax.device_get((factor.damp, factor.dead, factor.condition)))
  found = dict(damp=float(used), dead=int(dead.sum()), condition=float(condition))
  if not np.isfinite(used):
    found['fallback'] = ('rounded to nearest: H is zero, not finite, or has no Cholesky factor under any damping up to '
                         f'{damp * 10 ** (TRIES - 1):g} of its mean diagonal')
  elif used > np.float32(damp):
    found['fallback'] = f'damped by {used:g} of the mean diagonal: with {damp:g} H has no Cholesky factor'
  return found
