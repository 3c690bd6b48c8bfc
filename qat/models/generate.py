"""Text after text: a Decoder writes tokens, each of which it reads once."""

import functools

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
    key: a jax.random.key, if tokens are drawn.

  Returns:
    i32[b, count].
  """
  if not hasattr(model, 'caches'):
    raise TypeError(f'generate by a {type(model).__name__}, which has no caches. Give a models.decoder.Decoder.')
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2:
    raise ValueError(f'generate after tokens of shape {tokens.shape}: rows are [b, t]. Give tokens[None] for one.')
  total, most = tokens.shape[1] + count, model.config.context_length
  if count < 1 or tokens.shape[1] < 1 or total > most:
    raise ValueError(f'generate {count} tokens after {tokens.shape[1]}: the model has contexts of 2 to {most} tokens, '
                     'of which one or more are given and one or more are written. Ask for fewer, or shorten what is '
                     'given.')
  if temperature < 0 or (temperature > 0 and key is None):
    raise ValueError(f'generate with temperature {temperature} and key {key}: tokens are drawn by a key at a '
                     'temperature above 0. Give key=jax.random.key(0), or leave temperature at 0.')
  caches = model.caches(tokens.shape[0], -(-total // TILE) * TILE)
  (graph, state), (cache_graph, cached) = nnx.split(model), nnx.split(caches)
  return _written((graph, cache_graph), count, temperature > 0, state, cached, tokens, jnp.float32(temperature), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _written(graphs, count, drawn, state, cached, tokens, temperature, key):
  """One program for each structure, count and shape."""

  def read(cached, tokens):
    model, caches = nnx.merge(graphs[0], state), nnx.merge(graphs[1], cached)
    logits = model(tokens, caches)[:, -1].astype(jnp.float32)            # [b, vocab_size]
    return nnx.state(caches), logits

  def choose(logits, i):
    if drawn:
      return jax.random.categorical(jax.random.fold_in(key, i), logits / temperature).astype(tokens.dtype)
    return jnp.argmax(logits, axis=-1).astype(tokens.dtype)              # [b]

  def write(carry, i):
    cached, logits = carry
    token = choose(logits, i)
    return read(cached, token[:, None]), token

  (_, logits), first = jax.lax.scan(write, read(cached, tokens), jnp.arange(count - 1))
  return jnp.concatenate([first.T, choose(logits, count - 1)[:, None]], axis=1)
