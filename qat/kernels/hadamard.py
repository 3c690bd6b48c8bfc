"""The Hadamard rotation of the last axis, by the best implementation there is: core/hadamard.py is the definition.

Kernels have no gradient: this is for frozen models.
"""

import jax.numpy as jnp

from qat.core import hadamard
from qat.kernels import device, hadamard_gpu, hadamard_tpu

MODULES = {'gpu': hadamard_gpu, 'tpu': hadamard_tpu}


def transform(x, signs=None):
  """x diag(signs) H / sqrt(n), with the arguments of core.hadamard.transform, to the rounding of sums."""
  module = device.module_for(MODULES, hadamard, x)
  if module is hadamard:
    return hadamard.transform(x, signs)
  return module.transform(x if signs is None else x * jnp.broadcast_to(signs.astype(x.dtype), x.shape))
