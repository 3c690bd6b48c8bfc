"""How much each number of a block's output matters to the task: the diagonal of the Fisher information.

Li et al. BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, ICLR 2021, Sec. 3.3.
https://arxiv.org/abs/2102.05426

    min E[dz^T diag((dL/dz_1)^2, ..., (dL/dz_a)^2) dz]                   (Eq. 10)

where z is the output of the block and dz what quantization changes in it.

Differences from the paper: the squares are divided by their mean, so that the loss of a reconstruction keeps the
size for which AdaRound's regularizer was tuned (the authors' code adds 1 to each gradient instead).
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import calls, quantized


class Change(nnx.Variable):
  """What is added to an output: 0, of which the gradient is taken."""


def importances(model, batches, loss, paths):
  """The squared gradients of the loss by what modules of a network return, one pass over the batches for all.

  Args:
    model: in floats; it is measured in evaluation mode.
    batches: a list of what `loss` takes, all of one shape.
    loss: (model, batch) -> f32[].
    paths: of modules. Those that are not called once, or return no array of floats, are left out.

  Returns:
    {path: [bfloat16 of what the module returns, one a batch]}, for `scaled`. They are all kept.
  """
  watched = nnx.clone(model)
  watched.eval()
  log = calls.trace(watched, loss, batches[0])
  shapes = {path: [call.result for call in log if call.path == path] for path in paths}
  shapes = {path: y[0] for path, y in shapes.items() if len(y) == 1 and _is_float(y[0])}
  for path, module in quantized.walk(watched):
    if path in shapes:
      module.__class__ = _changed_type(type(module))
      module.change = Change(jnp.zeros(shapes[path].shape, shapes[path].dtype))
  graph, change, rest = nnx.split(watched, Change, ...)

  @jax.jit
  def squares(change, rest, batch):
    g = jax.grad(lambda change: loss(nnx.merge(graph, change, rest, copy=True), batch))(change)
    found = dict(quantized.walk(nnx.merge(graph, g, rest, copy=True)))
    squares = {path: jnp.square(found[path].change.get_value().astype(jnp.float32)) for path in shapes}
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), squares)         # Half the memory; weights need no more bits.

  found = {path: [] for path in shapes}
  for batch in batches:
    for path, g in squares(change, rest, batch).items():
      found[path].append(np.asarray(g))
  return found


def scaled(squares):
  """Squared gradients, a list of [b, ...], as the `importance` of all examples: f32[n, ...] of mean 1."""
  squares = jnp.concatenate([jnp.asarray(g, jnp.float32) for g in squares])
  mean = jnp.mean(squares)
  return jnp.where(mean > 0, squares / jnp.where(mean > 0, mean, jnp.ones_like(mean)), jnp.ones_like(squares))


def _is_float(y):
  return hasattr(y, 'dtype') and jnp.issubdtype(y.dtype, jnp.floating)


@functools.cache
def _changed_type(cls):
  """The subclass of a module class that adds its `change` to what it returns."""

  class Changed(cls):

    def __call__(self, *args, **kwargs):
      return super().__call__(*args, **kwargs) + self.change.get_value()

  return Changed


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
  return scaled([g * g])


def cross_entropy(labels):
  """The loss of scores f32[n, ..., classes] against labels i32[n, ...], summed."""
  return lambda scores: -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1))


def divergence(reference):
  """The KL divergence of scores from those of the float network, summed: BRECQ's loss, which needs no labels.

  Its gradient is 0 where the scores are the reference's: take it at the outputs of the quantized block.
  """
  p = jax.nn.softmax(reference)
  return lambda scores: jnp.sum(p * (jax.nn.log_softmax(reference) - jax.nn.log_softmax(scores)))
