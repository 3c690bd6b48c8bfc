"""The keys and values of the tokens so far: with them a Decoder reads each token once, and not again for the next."""

from flax import nnx
import jax
import jax.numpy as jnp


class Cache(nnx.Module):
  """Keys and values of one attention layer, in floats. Each text has a new one.

  An attention function whose `cache(batch, capacity, kv_heads, head_dim, dtype)` returns another one has that in its
  place; it has the same `batch`, `capacity`, `length` and `attend`.

  Attributes:
    keys, values: float[b, capacity, kv_heads, d].
    length: i32[], how many tokens are held.
  """

  def __init__(self, batch, capacity, kv_heads, head_dim, dtype):
    self.batch, self.capacity = batch, capacity
    self.keys, self.values = (nnx.Cache(jnp.zeros((batch, capacity, kv_heads, head_dim), dtype)) for _ in range(2))
    self.length = nnx.Cache(jnp.int32(0))

  def attend(self, attention_fn, query, key, value, mask):
    """Takes up t tokens, and attends from each to all up to it.

    Args:
      attention_fn: as nnx.dot_product_attention.
      query: [b, t, heads, d].
      key, value: [b, t, kv_heads, d]. There must be room for them.
      mask: bool[1, 1, t, capacity], which tokens each of the t sees.

    Returns:
      [b, t, heads, d].
    """
    start = self.length[...]
    for held, new in ((self.keys, key), (self.values, value)):
      held[...] = jax.lax.dynamic_update_slice_in_dim(held[...], new.astype(held.dtype), start, axis=1)
    self.length[...] = start + query.shape[1]
    return attention_fn(query, self.keys[...], self.values[...], mask=mask)


def make(attention_fn, *sizes):
  """An empty cache, in the form in which `attention_fn` keeps keys and values."""
  own = attention_fn.cache(*sizes) if hasattr(attention_fn, 'cache') else None
  return Cache(*sizes) if own is None else own


def check(caches, layers, shape):
  """Raises unless there is a cache for each layer, and each has room for tokens of `shape` [b, t] when it is empty."""
  b, t = shape
  sizes = sorted({(c.batch, c.capacity) for c in caches})
  if t == 0 or len(caches) != layers or any(rows != b or capacity < t for rows, capacity in sizes):
    raise ValueError(f'Decoder of {layers} layers, called on tokens of shape {shape} with {len(caches)} caches of '
                     f'(rows, tokens) {sizes}: there is no room, or no token. Make caches for one token or more: '
                     f'model.caches({b}, capacity), with a capacity of {max(t, 1)} or more.')
