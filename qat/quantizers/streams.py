"""Random numbers of quantizers: a stream for each layer, also for layers stacked in one array."""

from flax import nnx
import jax
import jax.numpy as jnp


class Stream(nnx.Module):
  """A key and a count. A call returns the key of this count; `advance` counts."""

  def __init__(self, key, lead=()):
    """`lead`: the axes on which layers are stacked; each gets keys of its own."""
    self.key = nnx.RngKey(jax.random.split(key, lead) if lead else key)
    self.count = nnx.RngCount(jnp.zeros(lead, jnp.uint32))

  def stacked(self, lead):
    return Stream(self.key[...], lead)

  def __call__(self):
    return jax.random.fold_in(self.key[...], self.count[...])

  def advance(self):
    self.count[...] = self.count[...] + jnp.uint32(1)
