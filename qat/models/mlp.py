"""The multilayer perceptron: linear layers with a relu between."""

import math

from flax import nnx


class MLP(nnx.Module):
  """Linear layers with a relu between, and none after the last."""

  def __init__(self, sizes, rngs, dtype=None):
    """Builds the layers.

    Args:
      sizes: the width of the input, of each hidden layer and of the output: (64, 128, 128, 10).
      rngs: where the initial weights come from.
      dtype: what the layers compute in; that of the input and weights if not given.

    >>> MLP((64, 128, 10), nnx.Rngs(0))(nnx.Rngs(1).normal((2, 8, 8, 1))).shape
    (2, 10)
    """
    if len(sizes) < 2:
      raise ValueError(
          f'MLP of sizes {tuple(sizes)}: {len(sizes)} sizes make no layer. '
          'Give at least the width of the input and of the output.')
    self.layers = nnx.List([
        nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)
        for inputs, outputs in zip(sizes, sizes[1:])])

  def __call__(self, x):
    """Scores the classes: f32[b, ...] -> f32[b, classes]. Each example is flattened."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))  # [b, inputs]
    for layer in self.layers[:-1]:
      x = nnx.relu(layer(x))
    return self.layers[-1](x)
