"""Attention of one query a head over a cache of keys and values in codes: what decoding a token does at each layer.

Keys and values have a scale a token: q k^T is multiplied by the keys' scales after the product, and the probabilities
by the values' before theirs, so that no key or value is decoded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import blocks, formats, qarray


def unsupported(query, keys, values):
  """Why a cache is not read in codes, or None."""
  for name, cache in (('keys', keys), ('values', values)):
    if not isinstance(cache, qarray.QArray) or cache.ndim != 3:
      return f'the {name} are no QArray[heads, t, d]'
    if cache.zero is not None or not isinstance(cache.spec.format, formats.Int | formats.Float):
      return f'the {name} are on {cache.spec}, with zero points or a codebook'
    if isinstance(cache.spec.block, blocks.Flat) or blocks.scale_shape(cache.spec.block, cache.shape) != (
        *cache.shape[:2], 1):
      return f'the {name} are on {cache.spec}, and have not one scale a token'
  if query.ndim != 3 or query.shape[0] != keys.shape[0] or query.shape[2] != keys.shape[2]:
    return f'the query of shape {query.shape} is no [kv_heads, group, d] for keys of shape {keys.shape}'
  return None


def decode(query: Float[Array, 'h g d'], keys, values, length) -> Float[Array, 'h g d']:
  """softmax(q k^T / sqrt(d)) v over the first `length` tokens: the definition.

  Args:
    query: [kv_heads, group, d]: the heads that share keys and values are a group.
    keys, values: QArray[kv_heads, t, d], a scale a token.
    length: i32[], how many tokens the cache holds, 1 or more.

  Returns:
    [kv_heads, group, d], in the dtype of the query.
  """
  if why := unsupported(query, keys, values):
    raise ValueError(f'Attention over a cache in codes: {why}. Encode keys and values with Spec(format, (None,)), or '
                     'use nnx.dot_product_attention.')
  t, d = keys.shape[1:]
  number = lambda q: q.spec.format.decode(q.codes)
  row = lambda q: jnp.swapaxes(qarray.decode(q.scale), 1, 2)             # [h, 1, t]
  high = dict(precision=jax.lax.Precision.HIGHEST)
  q = query.astype(jnp.float32) * jnp.float32(d**-0.5)
  scores = jnp.einsum('hgd,htd->hgt', q, number(keys), **high) * row(keys)
  scores = jnp.where(jnp.arange(t)[None, None] < length, scores, -jnp.inf)
  p = jax.nn.softmax(scores, axis=-1) * row(values)
  return qarray.cast(jnp.einsum('hgt,htd->hgd', p, number(values), **high), query.dtype)
