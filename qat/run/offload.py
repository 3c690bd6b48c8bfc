"""Optimizer states in the host's memory: they come to the device for the update, and go back.

Dettmers et al. QLoRA, NeurIPS 2023, Sec. 3, "Paged Optimizers". https://arxiv.org/abs/2305.14314

Difference from the paper: its pages move when the device runs out of memory, by the driver; here the whole state moves
at each step, as XLA orders it, so that the device holds it during the update only.
"""

import jax

DEVICE, HOST = 'device', 'pinned_host'


def to(memory):
  """tree -> the same in a memory of this kind, also inside jit; None leaves it where it is."""
  if memory is None:
    return lambda tree: tree
  kind = jax.memory.Space.Device if memory == DEVICE else jax.memory.Space.Host
  return lambda tree: jax.tree.map(lambda x: jax.device_put(x, kind), tree)


def memory(name):
  """The memory of a config's `optimizer.memory`: None for 'device'; raises where the backend has none of that kind."""
  device = jax.devices()[0]
  there = [m.kind for m in device.addressable_memories()]
  if name == DEVICE:
    return None
  if name != HOST or HOST not in there:
    raise ValueError(f'optimizer.memory {name!r}: {device.device_kind} has the memories {there}. Give {HOST!r} where '
                     f'it is one of them, or {DEVICE!r} to keep the state of the optimizer where the model is.')
  return name
