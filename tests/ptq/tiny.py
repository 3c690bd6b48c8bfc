"""Small models of each form, whose gains and offsets are not those of initialization, and what to call them with."""

import functools

from flax import nnx
import jax

from qat.models import cnn, decoder, encoder
from qat.nn import batch_norm

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 40)
IMAGES = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))


def perturbed(model, outliers=8.0):
  """`model` with random gains and biases; every 7th channel of a norm is an outlier."""
  for i, (path, p) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
    if p[...].ndim == 1:
      p[...] = p[...] + 0.3 * jax.random.normal(jax.random.key(i), p.shape)
      if path[-1] == 'scale':
        p[...] = p[...].at[::7].multiply(outliers)
  return model


@functools.cache
def gpt(**fields):
  sizes = dict(vocab_size=40, context_length=8, width=24, layers=2, heads=2)
  return perturbed(decoder.gpt(nnx.Rngs(0), **(sizes | fields)))


@functools.cache
def llama(**fields):
  """Four heads of queries share two of keys and values."""
  sizes = dict(vocab_size=40, context_length=8, width=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_width=48)
  return perturbed(decoder.llama(nnx.Rngs(0), **(sizes | fields)))


@functools.cache
def bert():
  config = encoder.Config(vocab_size=40, context_length=8, width=24, layers=2, heads=2, ffn_width=48)
  return perturbed(encoder.Encoder(config, nnx.Rngs(0)))


@functools.cache
def convs():
  """A depthwise network whose BatchNorms are folded."""
  model = cnn.SeparableCNN((8, 12), nnx.Rngs(0), classes=5, image_shape=(8, 8, 1))
  nnx.jit(lambda m, x: m(x))(model, IMAGES)                              # Statistics that are none of 0 and 1.
  perturbed(model).eval()
  return batch_norm.fold_batch_norm(model, IMAGES)
