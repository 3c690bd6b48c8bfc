"""Attention of one query a head over a cache of keys and values in codes: what decoding a token does at each layer.

Keys and values have a scale a token, and may have an offset: q k^T is multiplied by the keys' scales after the product,
and the probabilities by the values' before theirs, so that no key or value is decoded. An offset adds a product with
the sum of the query, or of the probabilities.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.core import qarray
from qat.kernels import tokens


def unsupported(query, keys, values):
  """Why a cache is not read in codes, or None."""
  for name, cache in (('keys', keys), ('values', values)):
    if not isinstance(cache, tokens.Tokens):
      return f'the {name} are a {type(cache).__name__}, and no Tokens'
  if query.ndim != 3 or query.shape[0] != keys.shape[0] or query.shape[2] != keys.shape[2]:
    return f'the query of shape {query.shape} is no [kv_heads, group, d] for keys of shape {keys.shape}'
  if keys.shape != values.shape:
    return f'there are keys of shape {keys.shape} and values of shape {values.shape}'
  return None


def decode(query: Float[Array, 'h g d'], keys: tokens.Tokens, values: tokens.Tokens, length) -> Float[Array, 'h g d']:
  """softmax(q k^T / sqrt(d)) v over the first `length` tokens: the definition.

  Args:
    query: [kv_heads, group, d]: the heads that share keys and values are a group.
    keys, values: Tokens[kv_heads, t, d], of tokens.of.
    length: i32[], how many tokens the cache holds, 1 or more. What is stored beyond has no weight, but must be finite.

  Returns:
    [kv_heads, group, d], in the dtype of the query.
  """
  if why := unsupported(query, keys, values):
    raise ValueError(f'Attention over a cache in codes: {why}. Give the Tokens of a QArray[kv_heads, t, d].')
  t, d = keys.shape[1:]
  high = dict(precision=jax.lax.Precision.HIGHEST)
  q = query.astype(jnp.float32) * jnp.float32(d**-0.5)
  scores = jnp.einsum('hgd,htd->hgt', q, keys.format.decode(keys.codes), **high) * keys.scale
  if keys.zero is not None:
    scores = scores + jnp.sum(q, axis=-1, keepdims=True) * keys.offset
  scores = jnp.where(jnp.arange(t)[None, None] < length, scores, -jnp.inf)
  p = jax.nn.softmax(scores, axis=-1)
  y = jnp.einsum('hgt,htd->hgd', p * values.scale, values.format.decode(values.codes), **high)
  if values.zero is not None:
    y = y + jnp.sum(p * values.offset, axis=-1, keepdims=True)
  return qarray.cast(y, query.dtype)
