"""Which kernel a device runs, where there is one for GPU and one for TPU beside XLA's form."""

import jax

from qat.kernels import pipeline_gpu


def module_for(modules, otherwise, *operands):
  """The module of this process' default device, if its kernel takes the operands.

  Args:
    modules: {'gpu': module, 'tpu': module}, each with unsupported(*operands). Those of 'gpu' are for Hopper.
    otherwise: the module of XLA's form.
  """
  name = jax.default_backend()
  if name not in modules or (name == 'gpu' and pipeline_gpu.needs_hopper(jax.devices()[0])):
    return otherwise
  return otherwise if modules[name].unsupported(*operands) else modules[name]
