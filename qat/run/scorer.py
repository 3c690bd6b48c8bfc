"""Scores a model over a test set, each example counted once."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.run import data
from qat.run import hosts
from qat.run import mesh


class Scorer:
  """Means over a test set. Compiles once for each structure of model."""

  def __init__(self, objective, source, batch_size, devices=mesh.ONE):
    """`devices` is where batches are put, of mesh.py."""
    self.objective, self.source, self.batch_size, self.devices = objective, source, batch_size, devices
    self.forward = jax.jit(self._forward, static_argnums=0)
    self.sums = jax.jit(self._sums)
    self.divergences = jax.jit(self._divergences)

  def _forward(self, graphdef, arrays, inputs):
    model = nnx.merge(graphdef, arrays)
    model.eval()
    return model(inputs)

  def _sums(self, outputs, batch):
    values = self.objective.values(outputs, batch)
    # A padded row adds nothing, not even a NaN.
    return {name: jnp.where(batch['mask'], v, 0).sum() for name, v in values.items()}

  def _divergences(self, outputs, others, mask):
    """(the sum of KL over the rows of examples, their count), of scores [b, ..., classes]."""
    log_p, log_q = (jax.nn.log_softmax(y.astype(jnp.float32), axis=-1) for y in (outputs, others))
    kl = jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0), axis=-1)  # [b, ...]
    kl = kl.reshape(len(mask), -1)
    return jnp.where(mask[:, None], kl, 0).sum(), mask.sum() * kl.shape[1]

  def outputs(self, model):
    """Yields (outputs, batch) over the test set."""
    graphdef, arrays = nnx.split(model)
    for batch in data.epoch(self.source, self.batch_size, self.devices.rows(self.batch_size)):
      batch = self.devices.put(batch, self.batch_size)
      yield self.forward(graphdef, arrays, self.objective.inputs(batch)), batch

  def __call__(self, model):
    """{name: mean} over the test set."""
    totals = [self.sums(outputs, batch) for outputs, batch in self.outputs(model)]
    # Summed in float64, in order: the same at any batch size to the last digit that is printed.
    return {name: float(np.sum([t[name] for t in totals], dtype=np.float64)) / len(self.source) for name in totals[0]}

  def mean_kl(self, model, frozen):
    """The mean of KL(model || frozen), in nats, over every row of scores of the test set."""
    pairs = zip(self.outputs(model), self.outputs(frozen))
    sums = [self.divergences(a, b, batch['mask']) for (a, batch), (b, _) in pairs]
    total, count = np.sum([[float(x) for x in pair] for pair in sums], axis=0)
    return float(total / count)

  def differences(self, model, frozen):
    """How the outputs of two models differ over the test set."""
    largest, agree, count = 0.0, 0, 0
    for (a, batch), (b, _) in zip(self.outputs(model), self.outputs(frozen)):
      a, b, mask = (hosts.fetch(x) for x in (a, b, batch['mask']))
      a, b = (x.astype(np.float32)[mask] for x in (a, b))
      largest = max(largest, float(np.abs(a - b).max()))
      agree += int((a.argmax(-1) == b.argmax(-1)).sum())
      count += a[..., 0].size
    return dict(frozen_equals_trained=largest == 0.0, largest_output_difference=largest, same_prediction=agree / count)
