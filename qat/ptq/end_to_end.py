"""The scales of all layers, trained together on the outputs of the whole network, under codes that stay.

Chen et al. EfficientQAT, ACL 2025, Sec. 3.3 (E2E-QP). https://arxiv.org/abs/2407.11062: its second phase, which trains
the step sizes alone, once each block has codes.

Differences from the paper: the loss is the distance from the float network's outputs, so that a task needs no labels
(theirs is that of the training set); scales that are on a grid of their own stay; the scales of the least distance over
all batches are kept, those of the start among them.
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from qat.core import qarray
from qat.nn import weights


def divergence(reference, outputs):
  """The mean KL(float || quantized) of softmax outputs, float[..., c]: f32[]."""
  log_p, log_q = (jax.nn.log_softmax(a.astype(jnp.float32), axis=-1) for a in (reference, outputs))
  return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def squares(reference, outputs):
  """The mean squared error, over the mean square of the float network's outputs: f32[]."""
  error = outputs.astype(jnp.float32) - reference.astype(jnp.float32)
  return jnp.mean(error ** 2) / jnp.maximum(jnp.mean(reference.astype(jnp.float32) ** 2), jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How scales are trained.

  Attributes:
    steps: of Adam, a batch each.
    rate: Adam's; the scale of each block is multiplied by 1 + what is learned.
    checks: how often, evenly spread, the distance over all batches is taken.
    distance: (the float network's outputs, outputs) -> f32[].
  """
  steps: int = 200
  rate: float = 1e-3
  checks: int = 4
  distance: Callable = divergence


def tune(model, floats, batches, apply, settings=Settings()):
  """A frozen model whose scales were trained, and its distances at the checks, the first before training.

  Args:
    model: what `qat.freeze` or a walk returned.
    floats: the float model.
    batches: a list of what `apply` takes; each is a step, in turn.
    apply: (model, batch) -> the outputs.
    settings: how.
  """
  model, floats, batches = nnx.clone(model), nnx.clone(floats), list(batches)
  model.eval()
  floats.eval()
  graph, codes, rest = nnx.split(model, weights.Codes, ...)
  float_graph, float_state = nnx.split(floats)
  learned = jax.tree.map(_factor, codes, is_leaf=_is_qarray)
  if not jax.tree.leaves(learned):
    raise ValueError('end_to_end.tune was given a model without codes whose scales are floats: there is nothing to '
                     'train. Give what qat.freeze or a walk returned, on a grid with scales in float32.')
  optimizer = optax.adam(settings.rate)

  def distance(learned, codes, rest, float_state, batch):
    reference = jax.lax.stop_gradient(apply(nnx.merge(float_graph, float_state, copy=True), batch))
    served = nnx.merge(graph, _scaled(codes, learned), rest, copy=True)
    return settings.distance(reference, apply(served, batch))

  measure = jax.jit(distance)
  gradient = jax.jit(jax.grad(distance))
  total = lambda learned: sum(float(measure(learned, codes, rest, float_state, b)) for b in batches) / len(batches)
  state, history = optimizer.init(learned), [total(learned)]
  best, ends = learned, {round(settings.steps * (i + 1) / settings.checks) for i in range(settings.checks)}
  for step in range(settings.steps):
    g = gradient(learned, codes, rest, float_state, batches[step % len(batches)])
    learned, state = _move(optimizer, learned, state, g)
    if step + 1 in ends:
      history.append(total(learned))
      best = learned if history[-1] < min(history[:-1]) else best
  tuned = nnx.merge(graph, _scaled(codes, best), rest, copy=True)
  nnx.update(model, nnx.state(tuned, weights.Codes))
  return model, history


@functools.partial(jax.jit, static_argnums=0)
def _move(optimizer, learned, state, g):
  with jax.numpy_dtype_promotion('standard'):  # optax's Adam raises a float to an integer.
    updates, state = optimizer.update(g, state)
  return optax.apply_updates(learned, updates), state


def _is_qarray(x):
  return isinstance(x, qarray.QArray)


def _factor(q):
  """What is learned of a scale, 0 at first; None where it is no float."""
  return jnp.zeros_like(q.scale) if _is_qarray(q) and isinstance(q.scale, jax.Array) else None


def _scaled(codes, learned):
  """The codes under their scales times 1 + learned."""
  def one(q, t):
    return q if t is None else dataclasses.replace(q, scale=q.scale * (1 + t))
  return jax.tree.map(one, codes, learned, is_leaf=lambda x: x is None or _is_qarray(x))
