"""Attention whose operands are quantized: queries, keys, values and probabilities."""

from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.attention import dot_product_attention_weights
import jax.numpy as jnp

from qat.nn import kv_cache


class Scores(nnx.Module):
  """A quantizer for each operand of the two products of attention, or None where it stays in floats."""

  def __init__(self, query, key, value, probabilities):
    self.query, self.key, self.value, self.probabilities = query, key, value, probabilities

  def __call__(self, query, key, value, bias=None, mask=None, **settings):
    """softmax(q k^T / sqrt(d)) v, with the arguments of nnx.dot_product_attention.

    Args:
      query: [*batch, t, heads, d].
      key, value: [*batch, s, kv_heads, d]; kv_heads divides heads.
    """
    promote = settings.get('promote_dtype', dtypes.promote_dtype)
    query, key, value = promote((query, key, value), dtype=settings.get('dtype'))
    return self.over(query, _placed(self.key, key), _placed(self.value, value), bias, mask, **settings)

  def over(self, query, key, value, bias=None, mask=None, **settings):
    """The same for keys and values that are on their grids, and in the dtype of the query."""
    share = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(a, share, axis=-2) for a in (key, value))
    weights = dot_product_attention_weights(_placed(self.query, query), key, bias, mask, **settings)
    weights = _placed(self.probabilities, weights)
    return jnp.einsum('...hqk,...khd->...qhd', weights, value, precision=settings.get('precision'))

  def cache(self, *sizes):
    """An empty cache of keys and values in codes, or None: see kv_cache.in_codes."""
    return kv_cache.in_codes(self, *sizes)

  def advance(self):
    for quantizer in (self.query, self.key, self.value, self.probabilities):
      if quantizer is not None:
        quantizer.advance()


def _placed(quantizer, x):
  return x if quantizer is None else quantizer(x)
