"""Random numbers of quantizers: a stream for each layer, also for layers stacked in one array."""

from flax import nnx
import jax
import jax.numpy as jnp


class Stream(nnx.Module):
  """A key and a count. Each call returns a new key."""

  def __init__(self, key, lead=()):
    """`lead`: the axes on which layers are stacked; each gets keys of its own."""
    self.key = nnx.RngKey(jax.random.split(key, lead) if lead else key)
    self.count = nnx.RngCount(jnp.zeros(lead, jnp.uint32))

  def stacked(self, lead):
    return Stream(self.key[...], lead)

  def __call__(self):
    key = jax.random.fold_in(self.key[...], self.count[...])
    self.count[...] = self.count[...] + jnp.uint32(1)
    return key
