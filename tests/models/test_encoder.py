from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import qat
from qat.models import encoder
from qat.nn import recipes

CONFIG = encoder.Config(vocab_size=11, context_length=8, width=8, layers=2, heads=2, ffn_width=20)
TOKENS = np.array([[1, 7, 3, 2, 0, 0], [4, 5, 6, 7, 8, 9]])
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
TYPES = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
forward = nnx.jit(lambda model, tokens, mask=None, types=None: model(tokens, mask, types))


def build(config=CONFIG, scale=1.0):
  """A model all of whose weights are random, biases and norms too."""
  model = encoder.Encoder(config, nnx.Rngs(0))
  random = np.random.default_rng(0)
  shake = lambda p: p + scale * random.normal(size=p.shape, scale=0.3).astype(np.float32)
  nnx.update(model, jax.tree.map(shake, nnx.state(model)))
  return model


@pytest.fixture(scope='module')
def model():
  return build()


def norm(x, w):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-12) * w['scale'] + w['bias']


def linear(x, w):
  return x @ w['kernel'] + w['bias']


def reference(w, tokens, mask, types, heads=2):
  """BERT in float64 from the papers, one sentence, one head and one query at a time, without the tokens masked."""
  rows = []
  for ids, kept, kinds in zip(tokens, mask, types):
    n = kept.sum()
    assert kept[:n].all()
    x = w['embed']['embedding'][ids[:n]] + w['position']['embedding'][:n] + w['type']['embedding'][kinds[:n]]
    x = norm(x, w['norm'])
    for block in w['blocks'].values():
      a = block['attention']
      q, k, v = (np.split(linear(x, a[name]), heads, axis=1) for name in 'qkv')
      mixed = [[scipy.special.softmax(k[h] @ query / np.sqrt(q[h].shape[1])) @ v[h] for query in q[h]]
               for h in range(heads)]
      x = norm(x + linear(np.concatenate(mixed, axis=1), a['o']), block['attention_norm'])
      up = linear(x, block['ffn']['up'])
      up = up * 0.5 * (1 + scipy.special.erf(up / np.sqrt(2)))
      x = norm(x + linear(up, block['ffn']['down']), block['ffn_norm'])
    rows.append(x)
  return rows


def test_the_forward_is_berts(model):
  w = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(model)))
  y = np.asarray(forward(model, TOKENS, MASK, TYPES))
  for got, want in zip(y, reference(w, TOKENS, MASK, TYPES)):
    np.testing.assert_allclose(got[:len(want)], want, atol=2e-5)


def test_masked_tokens_are_not_seen(model):
  """Whatever fills a row, and however long the filling is, up to the order of sums."""
  y = forward(model, TOKENS, MASK)
  other = np.where(MASK, TOKENS, 10)
  np.testing.assert_array_equal(y[MASK], forward(model, other, MASK)[MASK])
  assert np.abs(y - forward(model, other))[0, :4].max() > 1e-3
  np.testing.assert_allclose(y[0, :4], forward(model, TOKENS[:1, :4])[0], atol=1e-5)


def test_a_row_without_tokens_is_finite(model):
  mask = np.array([[False] * 6, [True] * 6])
  y = forward(model, TOKENS, mask)
  assert np.isfinite(y).all()
  np.testing.assert_array_equal(encoder.pool(y, mask)[0], np.zeros(8))


def test_every_token_sees_every_other_and_order_matters(model):
  y = forward(model, TOKENS[1:])
  later = forward(model, TOKENS[1:] + np.array([[0, 0, 0, 0, 0, 1]]))
  assert (np.abs(y - later).max(axis=2) > 1e-4).all()
  assert np.abs(y - forward(model, TOKENS[1:, ::-1])[:, ::-1]).max() > 1e-3


def test_pooling_against_numpy():
  x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
  means = np.stack([x[0, :4].mean(0), x[1].mean(0)])
  want = means / np.linalg.norm(means, axis=1, keepdims=True)
  np.testing.assert_allclose(jax.jit(encoder.pool)(x, MASK), want, rtol=1e-5)
  half = encoder.pool(jnp.asarray(x, jnp.bfloat16), MASK)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.02)


def test_blocks_are_a_chain(model):
  """What a walk over the blocks streams: the first argument of a block is the output of the one before."""
  x = model.norm(model.embed(TOKENS) + model.position(jnp.arange(6))[None] + model.type(jnp.zeros_like(TOKENS)))
  for block in model.blocks:
    x = block(x, MASK)
  np.testing.assert_allclose(x, forward(model, TOKENS, MASK), atol=1e-5)
  assert isinstance(model.blocks, nnx.List)


def test_attention_is_an_attribute():
  model = build()
  seen = []

  def attend(q, k, v, mask):
    seen.append((q.shape, k.shape, v.shape, mask.shape))
    return v

  for block in model.blocks:
    block.attention.attention_fn = attend
  model(TOKENS, MASK)
  assert seen == [((2, 6, 2, 4),) * 3 + ((2, 1, 1, 6),)] * 2


def test_it_quantizes_and_freezes(model):
  quantized = qat.quantize(model, recipes.get('w8a8'))
  y = forward(quantized, TOKENS, MASK)
  np.testing.assert_array_equal(y, forward(qat.freeze(quantized), TOKENS, MASK))
  assert 0 < np.abs(y - forward(model, TOKENS, MASK)).max() < 0.5


def test_what_does_not_fit_is_refused(model):
  with pytest.raises(ValueError, match=r'called on 9 tokens: it was built for 8\. Shorten'):
    model(np.zeros((1, 9), np.int32))
  with pytest.raises(ValueError, match=r'mask of shape \(6,\): the tokens are \(2, 6\)\. Give one entry a token'):
    model(TOKENS, MASK[0])
  with pytest.raises(ValueError, match=r'types of shape \(1, 6\): the tokens are \(2, 6\)'):
    model(TOKENS, MASK, TYPES[:1])
  with pytest.raises(ValueError, match='3 heads of width 8: the width is no multiple'):
    encoder.Config(vocab_size=11, context_length=8, width=8, layers=2, heads=3, ffn_width=20)


def test_layers_compute_in_the_dtype_asked_for():
  model = encoder.Encoder(CONFIG, nnx.Rngs(0), jnp.bfloat16)
  assert nnx.eval_shape(forward, model, TOKENS, MASK).dtype == jnp.bfloat16
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
