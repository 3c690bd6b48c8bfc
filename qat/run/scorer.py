"""Scores a model over a test set, each example counted once."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.run import data


class Scorer:
  """Means over a test set. Compiles once for each structure of model."""

  def __init__(self, objective, source, batch_size):
    self.objective, self.source, self.batch_size = objective, source, batch_size
    self.forward = jax.jit(self._forward, static_argnums=0)
    self.sums = jax.jit(self._sums)

  def _forward(self, graphdef, arrays, inputs):
    model = nnx.merge(graphdef, arrays)
    model.eval()
    return model(inputs)

  def _sums(self, outputs, batch):
    values = self.objective.values(outputs, batch)
    # A padded row adds nothing, not even a NaN.
    return {name: jnp.where(batch['mask'], v, 0).sum() for name, v in values.items()}

  def outputs(self, model):
    """Yields (outputs, batch) over the test set."""
    graphdef, arrays = nnx.split(model)
    for batch in data.epoch(self.source, self.batch_size):
      yield self.forward(graphdef, arrays, self.objective.inputs(batch)), batch

  def __call__(self, model):
    """{name: mean} over the test set."""
    totals = [self.sums(outputs, batch) for outputs, batch in self.outputs(model)]
    # Summed in float64, in order: the same at any batch size to the last digit that is printed.
    return {name: float(np.sum([t[name] for t in totals], dtype=np.float64)) / len(self.source) for name in totals[0]}

  def differences(self, model, frozen):
    """How the outputs of two models differ over the test set."""
    largest, agree, count = 0.0, 0, 0
    for (a, batch), (b, _) in zip(self.outputs(model), self.outputs(frozen)):
      a, b = (np.asarray(x, np.float32)[batch['mask']] for x in (a, b))
      largest = max(largest, float(np.abs(a - b).max()))
      agree += int((a.argmax(-1) == b.argmax(-1)).sum())
      count += a[..., 0].size
    return dict(frozen_equals_trained=largest == 0.0, largest_output_difference=largest, same_prediction=agree / count)
