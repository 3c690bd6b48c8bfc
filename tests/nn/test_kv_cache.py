"""A quantized model keeps keys and values in the codes that it was trained on."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.kernels import tokens as tokens_
from qat.models import decoder, generate, kv_cache as float_cache
from qat.nn import kv_cache, recipes
from qat.ptq import rotate
from qat.quantizers import ste

TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
forward = nnx.jit(lambda model, tokens: model(tokens))
read = nnx.jit(lambda model, caches, tokens: model(tokens, caches))


def model(recipe, turn=lambda model: model):
  floats = decoder.llama(nnx.Rngs(0), vocab_size=11, context_length=16, width=32, layers=1, heads=4, kv_heads=2)
  return qat.freeze(qat.quantize(turn(floats), recipes.get(recipe) if isinstance(recipe, str) else recipe))


@pytest.mark.parametrize('recipe, turn', [
    ('w4a16_kv2', None), ('w8a8_attention', None), ('float_kv4', rotate.rotate_scores)])
def test_tokens_read_in_parts_are_scored_as_a_whole(recipe, turn):
  """With queries and probabilities in floats, by attention on codes; with both on grids, on their numbers."""
  frozen = model(recipe, turn or (lambda model: model))
  caches, parts = frozen.caches(2, 12), []
  for start, stop in ((0, 7), (7, 8), (8, 9)):
    parts.append(read(frozen, caches, TOKENS[:, start:stop]))
  assert all(isinstance(c, kv_cache.CodeCache) for c in caches)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), forward(frozen, TOKENS), atol=1e-4)


def test_it_holds_the_numbers_that_training_sees():
  """To the bit: the first layer's keys and values, before anything is summed in another order."""
  quantized = qat.quantize(decoder.llama(nnx.Rngs(0), vocab_size=11, context_length=16, width=32, layers=1, heads=4),
                           recipes.get('float_kv4'))
  seen = {}
  scores = vars(vars(quantized.blocks[0].attention)['quantizers'])['scores']

  def watched(query, key, value, **settings):
    seen['numbers'] = scores.key(key), scores.value(value)
    return nnx.dot_product_attention(query, key, value, **settings)

  @nnx.jit
  def run(model, caches):
    logits = model(TOKENS, caches)
    twin = nnx.clone(model)
    twin.blocks[0].attention.attention_fn = watched
    vars(vars(twin.blocks[0].attention)['quantizers'])['scores'] = None
    twin(TOKENS)
    return logits, seen['numbers']

  caches = quantized.caches(2, 9)
  _, numbers = run(quantized, caches)
  for cache, expected in zip((caches[0].keys, caches[0].values), numbers):
    held = tokens_.decode(cache.get_value())                             # [b * heads, t, d]
    np.testing.assert_array_equal(held, jnp.swapaxes(expected, 1, 2).reshape(held.shape))


def test_4_bits_take_4():
  """4 bits a number, and a scale and a zero in float32 for each token of 8 channels."""
  cache = model('float_kv4').caches(2, 128)[0].keys.get_value()
  assert cache.codes.dtype == jnp.int4 and cache.codes.shape == (2 * 2, 128, 8)
  assert cache.scale.shape == cache.zero.shape == (2 * 2, 1, 128)


def test_a_scale_for_all_tokens_leaves_the_cache_in_floats():
  """And its operands are put on their grids at each call."""
  rule = qat.Rule('.*', cache=ste.STE(qat.specs.integer(8, qat.specs.TENSOR)))
  caches = model([rule]).caches(1, 8)
  assert all(isinstance(c, float_cache.Cache) for c in caches)


def test_a_model_that_rounds_by_chance_writes():
  floats = decoder.llama(nnx.Rngs(0), vocab_size=11, context_length=16, width=16, layers=1, heads=2)
  quantized = qat.quantize(floats, recipes.get('w4a8_stochastic'))
  assert generate.generate(quantized, TOKENS, 3).shape == (2, 3)


def test_a_prepared_model_writes_what_it_scores_highest():
  frozen = model('w8a8_kv8')
  y = generate.generate(qat.prepare(frozen), TOKENS, 6)
  logits = forward(frozen, jnp.concatenate([TOKENS, y], axis=1))[:, 8:-1]
  taken = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(taken, logits.max(-1), atol=1e-3)
