from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qat.models import decoder, rope

SIZES = dict(vocab_size=11, context_length=16, width=32, layers=2, heads=4)
FORMS = dict(gpt=decoder.gpt, llama=decoder.llama)
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)
forward = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def build(request):
  return request.param


def count(model):
  return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_future_tokens_do_not_change_past_logits(build):
  model = build(nnx.Rngs(0), **SIZES)
  before = forward(model, TOKENS)
  after = forward(model, TOKENS.at[:, 5].add(1) % 11)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (before[:, 5:] != after[:, 5:]).any(axis=(0, 2)).all()


def test_order_matters(build):
  """The last token sees the same set of tokens before it, in another order."""
  model = build(nnx.Rngs(0), **SIZES)
  swapped = TOKENS.at[0, :2].set(jnp.array([3, 4])), TOKENS.at[0, :2].set(jnp.array([4, 3]))
  a, b = (forward(model, tokens)[0, -1] for tokens in swapped)
  assert jnp.abs(a - b).max() > 1e-4


# Per layer: q, k, v, o; the feed-forward; the norms. Then the embedding(s) and the last norm.
def test_parameter_count_of_gpt():
  model = decoder.gpt(nnx.Rngs(0), **SIZES)
  layer = 4 * (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 2 * 2 * 32
  assert count(model) == 2 * layer + (11 + 16) * 32 + 2 * 32


def test_parameter_count_of_llama_with_shared_keys_and_its_own_head():
  model = decoder.llama(nnx.Rngs(0), kv_heads=2, ffn_width=64, tied_head=False, **SIZES)
  layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
  assert count(model) == 2 * layer + 2 * 11 * 32 + 32


def test_tied_head_is_the_embedding(build):
  model = build(nnx.Rngs(0), **SIZES)
  before = forward(model, TOKENS)
  model.norm.scale[...] = jnp.zeros(32)  # nothing reaches the head
  np.testing.assert_array_equal(forward(model, TOKENS), jnp.zeros(before.shape))
  assert not hasattr(model, 'head')
  assert hasattr(build(nnx.Rngs(0), tied_head=False, **SIZES), 'head')


def test_the_gradient_of_a_tied_head_reaches_unused_tokens():
  """Tokens that do not occur are still scored, so their embedding learns through the head."""
  model = decoder.llama(nnx.Rngs(0), **SIZES)
  loss = lambda m: jax.nn.log_softmax(m(TOKENS % 5))[..., 0].sum()
  g = nnx.jit(nnx.grad(loss))(model)
  assert (g['embed']['embedding'][...] != 0).any(axis=1).all()


def test_attention_by_hand():
  # One head of one feature: scores q_i k_j; token 1 weighs 0 and 1 by e^0 and e^(ln 3).
  q = jnp.array([5.0, 1.0]).reshape(1, 2, 1, 1)
  k = jnp.array([0.0, np.log(3.0)]).reshape(1, 2, 1, 1)
  v = jnp.array([8.0, 4.0]).reshape(1, 2, 1, 1)
  attention = decoder.llama(nnx.Rngs(0), **SIZES).blocks[0].attention
  mask = jnp.tril(jnp.ones((1, 1, 2, 2), bool))
  mixed = attention.attention_fn(q, k, v, mask=mask)
  np.testing.assert_allclose(mixed.ravel(), [8.0, 5.0], rtol=1e-6)


def test_shared_keys_equal_repeated_ones():
  """GQA is multi-head attention whose key and value kernels repeat; equal head counts need no repeat."""
  shared = decoder.llama(nnx.Rngs(0), kv_heads=2, **SIZES)
  full = decoder.llama(nnx.Rngs(1), kv_heads=4, **SIZES)
  state = nnx.to_pure_dict(nnx.state(shared))
  for block in state['blocks'].values():
    for name in ('k', 'v'):
      kernel = block['attention'][name]['kernel'].reshape(32, 2, 8)  # [width, kv, d]
      block['attention'][name]['kernel'] = jnp.repeat(kernel, 2, axis=1).reshape(32, 32)
  target = nnx.state(full)
  nnx.replace_by_pure_dict(target, state)
  nnx.update(full, target)
  np.testing.assert_allclose(forward(full, TOKENS), forward(shared, TOKENS), atol=1e-5)


def test_interleaved_rope_is_a_value():
  halves = decoder.llama(nnx.Rngs(0), **SIZES)
  turned = decoder.llama(nnx.Rngs(0), rope=rope.Rope(turn=rope.interleaved), **SIZES)
  a, b = forward(halves, TOKENS), forward(turned, TOKENS)
  np.testing.assert_allclose(a[:, 0], b[:, 0], atol=1e-6)  # position 0 does not turn
  assert jnp.abs(a - b).max() > 1e-3


def test_linears_are_plain_and_found_by_path():
  model = decoder.llama(nnx.Rngs(0), **SIZES)
  paths = {'/'.join(map(str, path)) for path, m in nnx.iter_modules(model) if type(m) is nnx.Linear}
  assert {p.removeprefix('blocks/0/') for p in paths if p.startswith('blocks/0/')} == {
      'attention/q', 'attention/k', 'attention/v', 'attention/o', 'ffn/gate', 'ffn/up', 'ffn/down'}


def test_another_attention_can_be_put_in_its_place(build):

  def first(q, k, v, mask):
    """Every token looks at the first one only."""
    return jnp.repeat(jnp.broadcast_to(v[:, :1], v.shape), q.shape[2] // v.shape[2], axis=2)

  model = build(nnx.Rngs(0), kv_heads=2, **SIZES)
  for block in model.blocks:
    block.attention.attention_fn = first
  changed = forward(model, TOKENS) != forward(model, TOKENS.at[:, 3].add(1) % 11)
  assert changed[:, 3].any() and not changed[:, 4:].any()


def test_computes_in_bfloat16_and_keeps_weights_in_float32(build):
  model = build(nnx.Rngs(0), dtype=jnp.bfloat16, **SIZES)
  exact = build(nnx.Rngs(0), **SIZES)
  logits = forward(model, TOKENS)
  assert logits.dtype == jnp.bfloat16
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
  np.testing.assert_allclose(logits.astype(jnp.float32), forward(exact, TOKENS), atol=0.1)


def test_learns_to_repeat(build):
  """A few steps on one sequence of period 3: every matrix has a gradient, and the loss falls."""
  model = build(nnx.Rngs(0), **SIZES)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  tokens = jnp.arange(9)[None] % 3

  def loss(m):
    return optax.softmax_cross_entropy_with_integer_labels(m(tokens[:, :-1]), tokens[:, 1:]).mean()

  @nnx.jit
  def step(model, optimizer):
    value, g = nnx.value_and_grad(loss)(model)
    optimizer.update(model, g)
    return value, g

  before, g = step(model, optimizer)
  matrices = [leaf for leaf in jax.tree.leaves(g) if leaf.ndim == 2]  # a key's bias moves no softmax
  assert all(jnp.isfinite(leaf).all() and (leaf != 0).any() for leaf in matrices)
  for _ in range(20):
    after, _ = step(model, optimizer)
  assert before > 1.5 and after < 0.1


@pytest.mark.parametrize('wrong, message', [
    (dict(heads=4, kv_heads=3), 'kv_heads 3 for 4 heads: .* divisor'),
    (dict(heads=5), '5 heads of width 32: .* multiple'),
])
def test_heads_that_do_not_fit(build, wrong, message):
  with pytest.raises(ValueError, match=message):
    build(nnx.Rngs(0), **(SIZES | wrong))


def test_too_many_tokens(build):
  with pytest.raises(ValueError, match='called on 17 tokens: it was built for 16'):
    build(nnx.Rngs(0), **SIZES)(jnp.zeros((1, 17), jnp.int32))


def test_queries_and_keys_may_have_their_own_bias_and_norms():
  model = decoder.llama(nnx.Rngs(0), qkv_bias=True, qk_norm=nnx.RMSNorm, kv_heads=2, **SIZES)
  plain = decoder.llama(nnx.Rngs(0), kv_heads=2, **SIZES)
  assert count(model) - count(plain) == 2 * (32 + 2 * 16 + 2 * 8)  # per layer: q, k, v; two norms of 8 features
  attention = model.blocks[0].attention
  assert attention.q.bias is not None and attention.o.bias is None and attention.q_norm.scale.shape == (8,)


def test_a_norm_of_queries_makes_their_length_irrelevant():
  model = decoder.llama(nnx.Rngs(0), qk_norm=nnx.RMSNorm, norm_epsilon=0.0, **SIZES)
  before = forward(model, TOKENS)
  for block in model.blocks:
    block.attention.q.kernel[...] *= 4.0
  np.testing.assert_allclose(forward(model, TOKENS), before, atol=1e-5)


def test_embeddings_are_scaled_for_the_layers_and_not_for_the_head():
  model = decoder.llama(nnx.Rngs(0), embed_scale=4.0, **SIZES)
  plain = decoder.llama(nnx.Rngs(0), tied_head=False, **SIZES)
  plain.embed.embedding[...] = 4.0 * model.embed.embedding[...]
  plain.head.kernel[...] = model.embed.embedding[...].T
  np.testing.assert_allclose(forward(model, TOKENS), forward(plain, TOKENS), atol=1e-5)


def test_geglu_by_hand():
  model = decoder.llama(nnx.Rngs(0), ffn=decoder.GeGLU, **(SIZES | dict(layers=1)))
  ffn = model.blocks[0].ffn
  x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
  g, u = x @ np.asarray(ffn.gate.kernel[...]), x @ np.asarray(ffn.up.kernel[...])
  gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
  np.testing.assert_allclose(ffn(jnp.asarray(x)), (gelu * u) @ np.asarray(ffn.down.kernel[...]), atol=1e-5)
