"""How much each number of a block's output matters to the task: the diagonal of the Fisher information.

Li et al. BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, ICLR 2021, Sec. 3.3.
https://arxiv.org/abs/2102.05426

    min E[dz^T diag((dL/dz_1)^2, ..., (dL/dz_a)^2) dz]                   (Eq. 10)

where z is the output of the block and dz what quantization changes in it.

Differences from the paper: the squares are divided by their mean, so that the loss of a reconstruction keeps the
size for which AdaRound's regularizer was tuned (the authors' code adds 1 to each gradient instead).
"""

import jax
import jax.numpy as jnp


def fisher(apply_rest, outputs, loss):
  """The `importance` of a block's outputs for ptq.reconstruct.

  Args:
    apply_rest: float[n, ...] -> anything: the network from the block's output on.
    outputs: float[n, ...], what the block gives.
    loss: what apply_rest returned -> f32[], a sum over the examples, such as `cross_entropy(labels)`.

  Returns:
    f32[n, ...], (dL/dz)^2 over its mean; 1 everywhere if no output matters.

  >>> fisher(lambda z: z, jnp.array([[1.0, 1.0, 2.0]]), lambda y: jnp.sum(y * y) / 2)
  Array([[0.5, 0.5, 2. ]], dtype=float32)
  """
  g = jax.grad(lambda z: loss(apply_rest(z)))(outputs).astype(jnp.float32)
  squares = g * g
  mean = jnp.mean(squares)
  return jnp.where(mean > 0, squares / jnp.where(mean > 0, mean, jnp.ones_like(mean)), jnp.ones_like(squares))


def cross_entropy(labels):
  """The loss of scores f32[n, ..., classes] against labels i32[n, ...], summed."""
  return lambda scores: -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1))


def divergence(reference):
  """The KL divergence of scores from those of the float network, summed: BRECQ's loss, which needs no labels.

  Its gradient is 0 where the scores are the reference's: take it at the outputs of the quantized block.
  """
  p = jax.nn.softmax(reference)
  return lambda scores: jnp.sum(p * (jax.nn.log_softmax(reference) - jax.nn.log_softmax(scores)))
