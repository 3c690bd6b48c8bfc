"""With a cache each token is read once, and scored as if all were read again."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.models import decoder, generate

SIZES = dict(vocab_size=11, context_length=16, width=16, layers=2, heads=2)
FORMS = dict(gpt=(decoder.gpt, {}), llama=(decoder.llama, dict(kv_heads=1)))
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
forward = nnx.jit(lambda model, tokens: model(tokens))
read = nnx.jit(lambda model, caches, tokens: model(tokens, caches))


@pytest.fixture(scope='module', params=FORMS.values(), ids=FORMS)
def model(request):
  build, fields = request.param
  return build(nnx.Rngs(0), **SIZES, **fields)


def test_tokens_read_in_parts_are_scored_as_a_whole(model):
  caches, parts = model.caches(2, 12), []
  for start, stop in ((0, 7), (7, 8), (8, 9)):
    parts.append(read(model, caches, TOKENS[:, start:stop]))
    assert caches[1].length[...] == stop
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), forward(model, TOKENS), atol=1e-5)


def test_the_likeliest_token_is_written_each_time(model):
  y = generate.generate(model, TOKENS, 6)
  logits = forward(model, jnp.concatenate([TOKENS, y], axis=1))
  assert y.shape == (2, 6) and y.dtype == TOKENS.dtype
  np.testing.assert_array_equal(y, jnp.argmax(logits, axis=-1)[:, 8:-1])


def test_tokens_are_drawn_by_their_probabilities():
  """1,200 rows of one text: the first token has the frequencies of the softmax, within four standard deviations."""
  model = decoder.gpt(nnx.Rngs(0), **SIZES | dict(layers=1))
  text = jnp.tile(TOKENS[:1], (1200, 1))
  y = generate.generate(model, text, 2, temperature=2.0, key=jax.random.key(3))
  p = jax.nn.softmax(forward(model, TOKENS[:1])[0, -1] / 2)
  np.testing.assert_array_less(np.abs(np.bincount(y[:, 0], minlength=11) / 1200 - p), 4 * np.sqrt(p * (1 - p) / 1200))
  np.testing.assert_array_equal(y, generate.generate(model, text, 2, temperature=2.0, key=jax.random.key(3)))
  cold = generate.generate(model, text, 2, temperature=1e-40, key=jax.random.key(3))
  assert (cold == generate.generate(model, TOKENS[:1], 2)).all()


def test_what_cannot_be_written_says_why(model):
  with pytest.raises(ValueError, match='contexts of 2 to 16 tokens'):
    generate.generate(model, TOKENS, 8)
  with pytest.raises(ValueError, match='one or more are written'):
    generate.generate(model, TOKENS, 0)
  with pytest.raises(ValueError, match='rows are whole numbers .b, t.'):
    generate.generate(model, TOKENS[0], 2)
  with pytest.raises(TypeError, match='a Linear, which has no caches'):
    generate.generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TOKENS, 2)
  for temperature in (1.0, float('nan'), -1.0):
    with pytest.raises(ValueError, match='Give key='):
      generate.generate(model, TOKENS, 2, temperature=temperature)
  for bad in (TOKENS + 3, TOKENS - 1):
    with pytest.raises(ValueError, match='the model has 11, from 0 on'):
      generate.generate(model, bad, 2)
  with pytest.raises(ValueError, match='with 0 caches'):
    model(TOKENS, [])
  with pytest.raises(ValueError, match=r'model.caches\(2, capacity\), with a capacity of 9'):
    model(TOKENS, model.caches(2, 8))
  with pytest.raises(ValueError, match=r'2 caches of \(rows, tokens\) .\(1, 16\).'):
    model(TOKENS, model.caches(1, 16))


def test_a_full_cache_shows(model):
  caches = model.caches(2, 8)
  assert jnp.isfinite(read(model, caches, TOKENS[:, :7])).all()
  assert jnp.isfinite(read(model, caches, TOKENS[:, 7:8])).all()
  assert jnp.isnan(read(model, caches, TOKENS[:, 8:9])).all()
