"""The Hadamard rotation of the last axis, by the best implementation there is: core/hadamard.py is the definition.

Kernels have no gradient of their own: that of the definition is given to all.
"""

import jax
import jax.numpy as jnp

from qat.core import hadamard
from qat.kernels import device, hadamard_gpu, hadamard_tpu

MODULES = {'gpu': hadamard_gpu, 'tpu': hadamard_tpu}


@jax.custom_vjp
def transform(x, signs=None):
  """x diag(signs) H / sqrt(n), with the arguments of core.hadamard.transform, to the rounding of sums."""
  module = device.module_for(MODULES, x)
  if module is None:
    return hadamard.transform(x, signs)
  x = x if signs is None else x * jnp.broadcast_to(signs.astype(x.dtype), x.shape)
  return device.undivided(module.transform, hadamard.transform, x)


def _backward(signs, dy):
  """The transpose, of a linear function."""
  _, pull = jax.vjp(lambda x: hadamard.transform(x, signs), dy)
  return *pull(dy), None


transform.defvjp(lambda x, signs: (transform(x, signs), signs), _backward)
