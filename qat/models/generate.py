"""Text after text: a Decoder writes tokens, each of which it reads once."""

import functools
import operator

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

TILE = 128  # Kernels read whole tiles of a cache.


def generate(model, tokens: Int[Array, 'b t'], count: int, temperature=0.0, key=None) -> Int[Array, 'b count']:
  """The `count` tokens that a Decoder writes after `tokens`.

  A quantized or frozen model keeps its keys and values in codes where they have a scale a token, as the recipes
  '..._kv8' and '..._kv4' give them.

  Args:
    model: a models.decoder.Decoder, in floats, quantized or frozen; it stays as it is.
    tokens: i32[b, t], 1 or more in each row.
    count: how many to write.
    temperature: 0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature).
      Quantizers that round by chance draw the same for each token.
    key: a jax.random.key, if tokens are drawn.

  Returns:
    i32[b, count].
  """
  if not hasattr(model, 'caches'):
    raise TypeError(f'generate by a {type(model).__name__}, which has no caches. Give a models.decoder.Decoder.')
  tokens, count, temperature = _checked(tokens, model.config.vocab_size), operator.index(count), float(temperature)
  total, most = tokens.shape[1] + count, model.config.context_length
  if count < 1 or tokens.shape[1] < 1 or total > most:
    raise ValueError(f'generate {count} tokens after {tokens.shape[1]}: the model has contexts of 2 to {most} tokens, '
                     'of which one or more are given and one or more are written. Ask for fewer, or shorten what is '
                     'given.')
  if not temperature >= 0 or (temperature > 0 and key is None):
    raise ValueError(f'generate with temperature {temperature} and key {key}: tokens are drawn by a key at a '
                     'temperature above 0. Give key=jax.random.key(0), or leave temperature at 0.')
  caches = model.caches(tokens.shape[0], -(-total // TILE) * TILE)
  (graph, state), (cache_graph, cached) = nnx.split(model), nnx.split(caches)
  return _written((graph, cache_graph), count, temperature > 0, state, cached, tokens, jnp.float32(temperature), key)


def _checked(tokens, size):
  """Tokens as i32[b, t], all of a vocabulary."""
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2 or not len(tokens) or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f'generate after {tokens.dtype}{list(tokens.shape)}: rows are whole numbers [b, t]. Give '
                     'tokens[None] for one row.')
  if not isinstance(tokens, jax.core.Tracer) and bool(((tokens < 0) | (tokens >= size)).any()):
    raise ValueError(f'generate after tokens of {tokens.min()} to {tokens.max()}: the model has {size}, from 0 on. Use '
                     'the tokenizer that it was trained with.')
  return tokens.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _written(graphs, count, drawn, state, cached, tokens, temperature, key):
  """One program for each structure, count and shape."""

  def read(cached, tokens):
    model, caches = (nnx.merge(*parts, copy=True) for parts in zip(graphs, (state, cached)))
    logits = model(tokens, caches)[:, -1].astype(jnp.float32)            # [b, vocab_size]
    return nnx.state(caches), logits

  def choose(logits, i):
    if not drawn:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)               # [b]
    below = logits - jnp.max(logits, axis=-1, keepdims=True)             # 0 of the likeliest, at any temperature.
    below = below / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    return jax.random.categorical(jax.random.fold_in(key, i), below).astype(jnp.int32)

  def write(carry, i):
    cached, logits = carry
    token = choose(logits, i)
    return read(cached, token[:, None]), token

  (_, logits), first = jax.lax.scan(write, read(cached, tokens), jnp.arange(count - 1))
  return jnp.concatenate([first.T, choose(logits, count - 1)[:, None]], axis=1)
