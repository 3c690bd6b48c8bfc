"""The cache of an attention layer in the codes of its quantizers: what a model was trained on is what it keeps."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from qat.kernels import attention, tokens
from qat.quantizers import base


class CodeCache(nnx.Module):
  """Keys and values of one attention layer in codes, for the Decoder in models/decoder.py. Each text has a new
  one.

  It is for serving, and passes no gradient to keys and values. One token attends in float32, whatever the dtype of the
  model: in bfloat16 that is near, and not equal, to a forward of all tokens at once.

  Attributes:
    keys, values: Tokens[b * kv_heads, capacity, d].
    length: i32[], how many tokens are held.
  """

  def __init__(self, scores, batch, capacity, kv_heads, head_dim, dtype):
    def empty(quantizer):
      x = jax.ShapeDtypeStruct((batch * kv_heads, capacity, head_dim), dtype)
      held = jax.eval_shape(lambda x: tokens.of(quantizer.encode(x)), x)
      return nnx.Cache(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), held))
    self.batch, self.capacity = batch, capacity
    self.keys, self.values = empty(scores.key), empty(scores.value)
    self.length = nnx.Cache(jnp.int32(0))

  def attend(self, attention_fn, query, key, value, mask):
    """Takes up t tokens, and attends from each to all up to it: [b, t, heads, d].

    Args:
      attention_fn: attention.Scores, or what changes the operands of one.
      query: [b, t, heads, d].
      key, value: [b, t, kv_heads, d]. There must be room for them.
      mask: bool[1, 1, t, capacity], which tokens each of the t sees.
    """
    if hasattr(attention_fn, 'around'):
      return attention_fn.around(functools.partial(self._attend, attention_fn.attend))(query, key, value, mask)
    return self._attend(attention_fn, query, key, value, mask)

  def _attend(self, scores, query, key, value, mask):
    (b, t, heads, d), start = query.shape, self.length[...]
    held = []
    for cache, quantizer, new in ((self.keys, scores.key, key), (self.values, scores.value, value)):
      rows = jnp.swapaxes(new, 1, 2).reshape(-1, t, d)                   # [b * kv_heads, t, d]
      held.append(cache.get_value().write(tokens.of(quantizer.encode(rows)), start))
      cache.set_value(held[-1])
    self.length[...] = start + t
    if t == 1 and scores.query is None and scores.probabilities is None:
      y = attention.decode(query.reshape(held[0].shape[0], -1, d), *held, start + 1)
      return y.reshape(b, 1, heads, d)
    keys, values = (jnp.swapaxes(tokens.decode(a).reshape(b, -1, self.capacity, d), 1, 2) for a in held)
    return scores.over(query, keys.astype(query.dtype), values.astype(query.dtype), mask=mask)


def in_codes(scores, batch, capacity, kv_heads, head_dim, dtype):
  """A CodeCache, or None where the grid of keys or of values has not one scale a token."""
  shape = (batch * kv_heads, capacity, head_dim)
  quantizers = scores.key, scores.value
  if any(not isinstance(q, base.Quantizer) or tokens.unsupported(q.spec, shape) for q in quantizers):
    return None
  return CodeCache(scores, batch, capacity, kv_heads, head_dim, dtype)
