"""prepare: a frozen model in, the same model in the layouts of a device's kernels out."""

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.kernels import matmul
from qat.nn import quantized, transform, weights


def prepare(model, target=None):
  """A copy of a frozen model that is fast to serve: products by codes in their kernel's layout.

  Weights that a kernel cannot multiply, or that their layer reads by hand (a lookup, a convolution), keep their codes;
  on CPU, where XLA is slow to decode, they are decoded once. Outputs are those of `model` to the rounding of sums. Save
  the frozen model, not this one: layouts belong to a version of a kernel. GPUs other than Hopper have no kernel yet:
  there a model stays as it is, and XLA multiplies.

  Args:
    model: what qat.freeze, a solver or a file gave.
    target: 'gpu', 'tpu' or 'cpu'; of this process' default device if not given.

  Returns:
    A model of the same class.
  """
  asked, target = target, target or jax.default_backend()
  matmul.check_name(target, 'A model is prepared for')
  model = nnx.clone(model)
  if asked is None and matmul.unavailable(target):
    return model
  found = {}  # id of Codes -> what takes their place.
  for path, layer in quantized.layers(model).items():
    for name in vars(layer)['quantizers'].weights:
      variable = vars(layer)[name]
      if not isinstance(variable, weights.Codes):
        raise ValueError(f"'{name}' of layer '{path}' holds floats: a model is prepared once it has codes. Call "
                         'qat.freeze first.')
      if id(variable) not in found and isinstance(variable.get_value(), qarray.QArray):
        found[id(variable)] = _prepared(layer, name, variable, target)
  transform.swap(model, {key: value for key, value in found.items() if value is not None})
  return model


def _prepared(layer, name, variable, target):
  """The variable that takes the place of Codes, or None if they stay."""
  q, quantizers = variable.get_value(), vars(layer)['quantizers']
  weight = quantizers.weights[name]
  if isinstance(layer, quantized.PRODUCTS) and not weight.layout.batch and q.ndim == 2:
    for inputs in ([] if quantizers.input is None else [quantizers.input.spec]) + [None]:
      if matmul.explain(_example(q.shape[0], inputs, target), q)[target] is None:
        return weights.Codes(matmul.prepare(q, target, inputs))
  return weights.Decoded(weight.decode(variable)) if target == 'cpu' else None


def _example(size, inputs, target):
  """A row of inputs, of shapes only."""
  if inputs is None:
    return jax.ShapeDtypeStruct((1, size), jnp.float32 if target == 'cpu' else jnp.bfloat16)
  return jax.eval_shape(lambda x: qarray.encode(x, inputs), jax.ShapeDtypeStruct((1, size), jnp.float32))
