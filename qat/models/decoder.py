"""The decoder-only transformer, in the form of GPT-2 and in that of Llama, and what Qwen and Gemma change in it.

Radford et al. Language Models are Unsupervised Multitask Learners, 2019.
Touvron et al. LLaMA: Open and Efficient Foundation Language Models, 2023. https://arxiv.org/abs/2302.13971
Yang et al. Qwen2 Technical Report, 2024. https://arxiv.org/abs/2407.10671; Qwen3, 2025.
https://arxiv.org/abs/2505.09388 Gemma Team. Gemma: Open Models Based on Gemini Research and Technology, 2024.
https://arxiv.org/abs/2403.08295

Differences from GPT-2: no dropout; linear layers start from Flax's variance (1 / inputs) and not from 0.02^2,
which is meant for widths near 2,500; those that write to the residual stream are scaled by 1 / sqrt(2 layers)
as there (Sec. 2.3).
"""

import dataclasses
import functools

from flax import nnx
import jax.numpy as jnp

from qat.models import kv_cache, rope as ropes


class GELU(nnx.Module):
  """GPT's feed-forward layer: up, gelu, down."""

  def __init__(self, config, linear, residual):
    self.up = linear(config.width, config.ffn_width)
    self.down = residual(config.ffn_width, config.width)

  def __call__(self, x):
    """f32[b, t, width] -> f32[b, t, width]."""
    return self.down(nnx.gelu(self.up(x)))  # the tanh form, as in GPT-2


class SwiGLU(nnx.Module):
  """Llama's feed-forward layer: down(silu(gate) * up).

  Shazeer. GLU Variants Improve Transformer, 2020. https://arxiv.org/abs/2002.05202
  """

  def __init__(self, config, linear, residual):
    self.gate = linear(config.width, config.ffn_width)
    self.up = linear(config.width, config.ffn_width)
    self.down = residual(config.ffn_width, config.width)

  def __call__(self, x):
    """f32[b, t, width] -> f32[b, t, width]."""
    return self.down(nnx.silu(self.gate(x)) * self.up(x))


class GeGLU(nnx.Module):
  """Gemma's feed-forward layer: down(gelu(gate) * up).

  Shazeer. GLU Variants Improve Transformer, 2020. https://arxiv.org/abs/2002.05202
  """

  def __init__(self, config, linear, residual):
    self.gate = linear(config.width, config.ffn_width)
    self.up = linear(config.width, config.ffn_width)
    self.down = residual(config.ffn_width, config.width)

  def __call__(self, x):
    """f32[b, t, width] -> f32[b, t, width]."""
    return self.down(nnx.gelu(self.gate(x)) * self.up(x))  # the tanh form, as in Gemma


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of a decoder, and its form. GPT and LLAMA below are forms.

  Attributes:
    heads: of queries; kv_heads of them share a key and a value (Ainslie et al. 2023, GQA).
    norm: nnx.LayerNorm or nnx.RMSNorm.
    ffn: GELU, SwiGLU or GeGLU.
    rope: how positions turn queries and keys; None learns a vector for each position instead.
    use_bias: whether linear layers add one.
    tied_head: whether the embedding is the head as well, one variable.
    qkv_bias: whether queries, keys and values add one even if the other layers do not (Qwen2).
    qk_norm: of each head's queries and keys, before they are turned (Qwen3); None leaves them as they are.
    embed_scale: what the embeddings of the tokens are multiplied by, though not those of the head (Gemma).
  """

  vocab_size: int
  context_length: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn_width: int
  norm: type[nnx.Module]
  norm_epsilon: float
  ffn: type[nnx.Module]
  rope: ropes.Rope | None
  use_bias: bool
  tied_head: bool
  qkv_bias: bool = False
  qk_norm: type[nnx.Module] | None = None
  embed_scale: float = 1.0

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
          f'Config.kv_heads {self.kv_heads} for {self.heads} heads: each key must serve as many '
          'queries as the next. Choose a divisor of heads.')


class SelfAttention(nnx.Module):
  """Projects to queries, keys and values, attends, projects back.

  `attention_fn` is an attribute, so that another can be put in its place.
  """

  def __init__(self, config, linear, residual, norm):
    self.config = config
    project = functools.partial(linear, use_bias=config.use_bias or config.qkv_bias)
    self.q = project(config.width, config.heads * config.head_dim)
    self.k = project(config.width, config.kv_heads * config.head_dim)
    self.v = project(config.width, config.kv_heads * config.head_dim)
    self.o = residual(config.heads * config.head_dim, config.width)
    if config.qk_norm is not None:
      self.q_norm = norm(config.qk_norm, config.head_dim)
      self.k_norm = norm(config.qk_norm, config.head_dim)
    self.attention_fn = nnx.dot_product_attention

  def cache(self, batch, capacity):
    """An empty cache for `capacity` tokens in each of `batch` rows."""
    dtype = self.k.dtype or self.k.param_dtype
    return kv_cache.make(self.attention_fn, batch, capacity, self.config.kv_heads, self.config.head_dim, dtype)

  def __call__(self, x, cache=None):
    """f32[b, t, width] -> f32[b, t, width]; the tokens come after those of the cache, if there is one."""
    b, t, _ = x.shape
    split = lambda y, heads: y.reshape(b, t, heads, self.config.head_dim)
    q = split(self.q(x), self.config.heads)     # [b, t, h, d]
    k = split(self.k(x), self.config.kv_heads)  # [b, t, kv, d]
    v = split(self.v(x), self.config.kv_heads)  # [b, t, kv, d]
    if self.config.qk_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    positions = jnp.arange(t) if cache is None else cache.length[...] + jnp.arange(t)
    if self.config.rope is not None:
      q, k = (self.config.rope(y, positions) for y in (q, k))
    if cache is None:
      past = jnp.tril(jnp.ones((1, 1, t, t), bool))
      return self.o(self.attention_fn(q, k, v, mask=past).reshape(b, t, -1))
    past = (jnp.arange(cache.capacity)[None, :] <= positions[:, None])[None, None]  # [1, 1, t, capacity]
    return self.o(cache.attend(self.attention_fn, q, k, v, past).reshape(b, t, -1))


class Block(nnx.Module):
  """Attention, then the feed-forward layer, each normalized before and added after."""

  def __init__(self, config, linear, residual, norm):
    self.attention_norm = norm(config.norm, config.width)
    self.attention = SelfAttention(config, linear, residual, norm)
    self.ffn_norm = norm(config.norm, config.width)
    self.ffn = config.ffn(config, linear, residual)

  def __call__(self, x, *cache):
    """f32[b, t, width] -> f32[b, t, width]; with the cache of its attention, if that is given."""
    x = x + self.attention(self.attention_norm(x), *cache)
    return x + self.ffn(self.ffn_norm(x))


class Decoder(nnx.Module):
  """Scores the next token at every position, from the tokens up to it."""

  def __init__(self, config, rngs, dtype=None):
    """Builds the blocks.

    Args:
      config: sizes and form.
      rngs: where the initial weights come from.
      dtype: what the layers compute in; float32 if not given. Weights are float32 always.
    """
    linear = functools.partial(nnx.Linear, use_bias=config.use_bias, dtype=dtype, rngs=rngs)
    residual = functools.partial(linear, kernel_init=nnx.initializers.variance_scaling(
        0.5 / config.layers, 'fan_in', 'truncated_normal'))
    norm = lambda kind, width: kind(width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
    self.config = config
    self.embed = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
    if config.rope is None:
      self.position = nnx.Embed(config.context_length, config.width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List([
        Block(config, linear, residual, norm) for _ in range(config.layers)])
    self.norm = norm(config.norm, config.width)
    if not config.tied_head:
      self.head = nnx.Linear(
          config.width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

  def caches(self, batch, capacity):
    """An empty cache for each block, of `capacity` tokens in each of `batch` rows: for one text a row."""
    return nnx.List([block.attention.cache(batch, capacity) for block in self.blocks])

  def __call__(self, tokens, caches=None):
    """Scores the token after each.

    Args:
      tokens: i32[b, t].
      caches: of `self.caches`, which take up these tokens: they come after those held already.

    Returns:
      f32[b, t, vocab_size]; NaN if the caches, or the context, have no room for all of the tokens.
    """
    t = tokens.shape[1]
    if t > self.config.context_length:
      raise ValueError(
          f'Decoder called on {t} tokens: it was built for {self.config.context_length}. '
          'Shorten the tokens, or build it with a longer context_length.')
    x = self.embed(tokens) * self.config.embed_scale  # [b, t, width]
    positions = jnp.arange(t)
    if caches is not None:
      kv_cache.check(caches, len(self.blocks), tokens.shape)
      positions = caches[0].length[...] + positions
    if self.config.rope is None:
      x = x + self.position(positions)[None]
    for i, block in enumerate(self.blocks):
      x = block(x) if caches is None else block(x, caches[i])
    x = self.norm(x)
    if caches is not None:  # No compiled program can raise.
      x = jnp.where(positions[-1] < min(caches[0].capacity, self.config.context_length), x, jnp.nan)
    return self.embed.attend(x) if self.config.tied_head else self.head(x)


GPT = dict(
    norm=nnx.LayerNorm, norm_epsilon=1e-5, ffn=GELU, rope=None, use_bias=True, tied_head=True)
LLAMA = dict(
    norm=nnx.RMSNorm, norm_epsilon=1e-5, ffn=SwiGLU, rope=ropes.Rope(), use_bias=False,
    tied_head=True)


def gpt(rngs, *, width, heads, dtype=None, **fields):
  """Builds a Decoder in GPT-2's form.

  Args:
    rngs: where the initial weights come from.
    width, heads, **fields: those of Config; the form, kv_heads, head_dim and ffn_width have GPT-2's defaults.
    dtype: what the layers compute in.

  >>> import jax
  >>> model = gpt(nnx.Rngs(0), vocab_size=65, context_length=128, width=128, layers=5, heads=4)
  >>> sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
  1016320
  """
  sizes = dict(
      width=width, heads=heads, kv_heads=heads, head_dim=_split(width, heads), ffn_width=4 * width)
  return Decoder(Config(**(GPT | sizes | fields)), rngs, dtype)


def llama(rngs, *, width, heads, dtype=None, **fields):
  """Builds a Decoder in Llama's form.

  Args:
    rngs: where the initial weights come from.
    width, heads, **fields: those of Config; the form, kv_heads, head_dim and ffn_width have defaults:
      ffn_width 8/3 of the width, which costs what GPT's two matrices do, rounded up to a multiple of 64.
    dtype: what the layers compute in.

  >>> llama(nnx.Rngs(0), vocab_size=65, context_length=128, width=96, layers=1, heads=4).config.ffn_width
  256
  """
  sizes = dict(
      width=width, heads=heads, kv_heads=heads, head_dim=_split(width, heads),
      ffn_width=-(-8 * width // (3 * 64)) * 64)
  return Decoder(Config(**(LLAMA | sizes | fields)), rngs, dtype)


def halved(model):
  """A copy of a Decoder that turns neighbours by their positions, as GGUF's do, which turns the halves of a head
  instead.

  It computes the same: the outputs of queries and keys are reordered, which later products do not see. Raises for
  codes, whose blocks may lie across outputs: reorder floats, then quantize.
  """
  model, config = nnx.clone(model), model.config
  if config.rope is None or config.rope.turn is ropes.halves:
    return model
  model.config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, turn=ropes.halves))
  for block in model.blocks:
    block.attention.config = model.config
    turned = ('q', 'k', 'q_norm', 'k_norm') if config.qk_norm else ('q', 'k')
    for variable in [v for name in turned for v in vars(getattr(block.attention, name)).values()]:
      if isinstance(variable, nnx.Variable):
        variable.set_value(_halves(variable.get_value(), config.head_dim))
  return model


def _halves(x, head_dim):
  """Features 2i and 2i + 1 of each head of the last axis, at i and i + head_dim / 2."""
  if not hasattr(x, 'ndim') or hasattr(x, 'codes'):
    raise ValueError('decoder.halved of a frozen model: it holds codes, and no floats to reorder. Give it the float '
                     'model.')
  pairs = x.reshape(*x.shape[:-1], -1, head_dim // 2, 2)
  return jnp.moveaxis(pairs, -1, -2).reshape(x.shape)


def _split(width, heads):
  """The features of each head."""
  if width % heads:
    raise ValueError(
        f'{heads} heads of width {width}: the width is no multiple of the heads. '
        'Choose one that is.')
  return width // heads
