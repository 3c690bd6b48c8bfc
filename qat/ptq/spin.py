"""SpinQuant: learn the rotations by descent among the orthogonal matrices.

Liu et al. SpinQuant: LLM Quantization with Learned Rotations, 2024. https://arxiv.org/abs/2405.16406
Li, Fuxin, Todorovic. Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform, ICLR 2020.
https://arxiv.org/abs/2002.01113 (whose names are used: X, W, alpha, q).

Straight-through rounding alone tells a rotation little: with y = (x R) (R^T W), what the errors of x and W leave of the
gradient is symmetric to first order, and only the skew part turns R. What a rotation should do is shrink the ranges,
so quantize by `Ranged`, whose ranges hand gradients on.

Differences from the papers: ranges have gradients, which their code stops; the Cayley transform is solved for, where
their code takes 5 steps of a fixed point; a Newton-Schulz step keeps rounding from adding up, where their code draws a
QR decomposition now and then; the rotation of the least loss over all steps is returned, with the loss of each step
that of its own batch.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import blocks, qarray
from qat.quantizers import base, lsq, ste

# The code's (optimizer.py): the step is at most 2 q / |W|_1.
Q, EPSILON = 0.5, 1e-8


def cayley_step(R, G, lr):
  """One step of descent that stays orthogonal.

  With the skew W = A - A^T, A = G R^T - R (R^T G R^T) / 2 (Alg. 1, lines 4-5), the step is the Cayley transform
  (I + alpha / 2 W)^-1 (I - alpha / 2 W) R, and alpha = min(lr, 2 q / |W|_1).

  Args:
    R: f32[n, n], orthogonal.
    G: f32[n, n], the gradient of the loss by R.
    lr: f32[], the largest step.

  Returns:
    f32[n, n], orthogonal to 1e-5.
  """
  dot = functools.partial(jnp.matmul, precision='highest')
  A = dot(G, R.T) - dot(R, dot(R.T, dot(G, R.T))) * 0.5
  W = A - A.T
  norm = jnp.max(jnp.sum(jnp.abs(W), 0))
  alpha = jnp.minimum(jnp.asarray(lr, R.dtype), 2 * Q / (norm + EPSILON))
  I = jnp.eye(len(R), dtype=R.dtype)
  R = jnp.linalg.solve(I + alpha * 0.5 * W, dot(I - alpha * 0.5 * W, R))
  return dot(R, 1.5 * I - 0.5 * dot(R.T, R))                              # Newton-Schulz: |R^T R - I| is squared.


def learn(loss, rotations, model, batches, lr=1.5):
  """Rotations under which a model's loss is small, by `len(batches)` steps of a cosine from lr to 0.

  The paper takes 100 steps of 1.5, of R1 and R2, from random Hadamard matrices.

  Args:
    loss: (rotations, model, batch) -> f32[], such as that of the rotated and then quantized model.
    rotations: a pytree of f32[n, n], orthogonal.
    model: what loss is given; it is not changed.
    batches: a list.
    lr: of the first step.

  Returns:
    The rotations of the least loss, of all that were tried, and the losses: a list of floats, one a step.
  """
  batches, losses = list(batches), []
  if not batches:
    raise ValueError('spin.learn was given no batch: each is a step. Give 100, as the paper does.')
  step, best = _step(loss), rotations
  for i, batch in enumerate(batches):
    now = lr * 0.5 * (1 + math.cos(math.pi * i / len(batches)))
    value, after = step(rotations, nnx.clone(model), batch, jnp.float32(now))
    losses.append(float(value))
    if not math.isfinite(losses[-1]):
      raise ValueError(f'spin.learn: the loss of step {i} is {losses[-1]}. Look at the batch, or take a grid on which '
                       'the rotated model is finite.')
    if losses[-1] <= min(losses):
      best = rotations
    rotations = after
  return best, losses


class Ranged(ste.STE):
  """STE whose range, max|x|, hands on the gradient that LSQ gives a step (Esser et al. 2020, Eq. 3)."""

  def __init__(self, spec):
    if spec.zero is not None or spec.block is None:
      raise ValueError(f'Ranged({spec}): the gradient of a range is that of a scale alone. Use a grid that has scales '
                       'and no zero.')
    super().__init__(spec)

  def __call__(self, x):
    v = x.astype(jnp.float32)
    largest = blocks.over_blocks(jnp.max, jnp.abs(v), self.spec.block) * (1 / (self.spec.format.max or 1))
    # On the bits of the grid, with the gradient of max|x| / format.max.
    s = base.straight_through(largest, qarray.decode(self.grid(jax.lax.stop_gradient(x))[0]))
    return lsq.lsq(x, s, self.spec, 1.0)

  def both(self, x):
    return self(x), self.encode(jax.lax.stop_gradient(x))


def _step(loss):
  """(rotations, model, batch, lr) -> the loss, and the rotations after a step."""

  @nnx.jit
  def step(rotations, model, batch, lr):
    value, gradients = jax.value_and_grad(loss)(rotations, model, batch)
    return value, jax.tree.map(lambda R, G: cayley_step(R, G, lr), rotations, gradients)

  return step
