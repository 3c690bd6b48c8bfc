"""prepare: a frozen model in, the same model in the layouts of a device's kernels out."""

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import hadamard as definition, qarray
from qat.kernels import hadamard, matmul
from qat.nn import quantized, transform, weights


def prepare(model, target=None):
  """A copy of a frozen model that is fast to serve: products by codes in their kernel's layout.

  Weights that a kernel cannot multiply, or that their layer reads by hand (a lookup, a convolution), keep their codes;
  on CPU, where XLA is slow to decode, they are decoded once. Outputs are those of `model` to the rounding of sums. Save
  the frozen model, not this one: layouts belong to a version of a kernel. On a GPU other than Hopper codes stay as they
  are, and XLA multiplies; but Blackwell's block-scaled product has MXFP8 and NVFP4 turned around.

  Args:
    model: what qat.freeze, a solver or a file gave.
    target: 'gpu', 'tpu' or 'cpu'; of this process' default device if not given.

  Returns:
    A model of the same class.
  """
  target = target or jax.default_backend()
  matmul.check_name(target, 'A model is prepared for')
  model = nnx.clone(model)
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
  for _, module in quantized.walk(model):
    if vars(module).get('rotation') is definition.transform:             # Of ptq's online rotations.
      module.rotation = hadamard.transform
  return model


def _prepared(layer, name, variable, target):
  """The variable that takes the place of Codes, or None if they stay."""
  q, quantizers = variable.get_value(), vars(layer)['quantizers']
  weight = quantizers.weights[name]
  if isinstance(layer, quantized.PRODUCTS) and not weight.layout.batch and q.ndim == 2:
    for inputs in ([] if quantizers.input is None else [quantizers.input.spec]) + [None]:
      x = _example(q.shape[0], inputs, target)
      here = target == jax.default_backend()                             # Of a device that is not here, all is run.
      if matmul.explain(x, q)[target] is None and not (here and matmul.unavailable(target, x, q)):
        return weights.Codes(matmul.prepare(q, target, inputs))
  return weights.Decoded(weight.decode(variable)) if target == 'cpu' else None


def _example(size, inputs, target):
  """A row of inputs, of shapes only."""
  if inputs is None:
    return jax.ShapeDtypeStruct((1, size), jnp.float32 if target == 'cpu' else jnp.bfloat16)
  return jax.eval_shape(lambda x: qarray.encode(x, inputs), jax.ShapeDtypeStruct((1, size), jnp.float32))
