"""The encoder of BERT: every token sees every other, and each residual sum is normalized after.

Devlin et al. BERT: Pre-training of Deep Bidirectional Transformers, NAACL 2019. https://arxiv.org/abs/1810.04805
Vaswani et al. Attention Is All You Need, NeurIPS 2017, Sec. 3. https://arxiv.org/abs/1706.03762
Reimers and Gurevych. Sentence-BERT, EMNLP 2019, Sec. 3, for `pool`. https://arxiv.org/abs/1908.10084

Differences from BERT: no dropout, and no pooler (a tanh layer on the first token), which sentence embeddings do not
read; linear layers start from Flax's variance (1 / inputs) and not from 0.02^2.
"""

import dataclasses
import functools

from flax import nnx
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of an encoder.

  Attributes:
    types: how many kinds of segments there are: the sentences A and B of a pair.
  """

  vocab_size: int
  context_length: int
  width: int
  layers: int
  heads: int
  ffn_width: int
  types: int = 2
  norm_epsilon: float = 1e-12

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(f'{self.heads} heads of width {self.width}: the width is no multiple of the heads. '
                       'Choose one that is.')


class SelfAttention(nnx.Module):
  """Projects to queries, keys and values, attends, projects back.

  `attention_fn` is an attribute, so that another can be put in its place.
  """

  def __init__(self, config, linear):
    self.heads = config.heads
    self.q, self.k, self.v, self.o = (linear(config.width, config.width) for _ in range(4))
    self.attention_fn = nnx.dot_product_attention

  def __call__(self, x, mask=None):
    """f32[b, t, width], bool[b, t] -> f32[b, t, width]."""
    b, t, width = x.shape
    q, k, v = (layer(x).reshape(b, t, self.heads, -1) for layer in (self.q, self.k, self.v))  # [b, t, h, d]
    mask = None if mask is None else mask[:, None, None, :]                                   # [b, h, query, key]
    return self.o(self.attention_fn(q, k, v, mask=mask).reshape(b, t, width))


class GELU(nnx.Module):
  """The feed-forward layer: up, gelu in its exact form, down."""

  def __init__(self, config, linear):
    self.up = linear(config.width, config.ffn_width)
    self.down = linear(config.ffn_width, config.width)

  def __call__(self, x):
    """f32[b, t, width] -> f32[b, t, width]."""
    return self.down(nnx.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
  """Attention, then the feed-forward layer, each added to its input and then normalized."""

  def __init__(self, config, linear, norm):
    self.attention = SelfAttention(config, linear)
    self.attention_norm = norm()
    self.ffn = GELU(config, linear)
    self.ffn_norm = norm()

  def __call__(self, x, mask=None):
    """f32[b, t, width], bool[b, t] -> f32[b, t, width]."""
    x = self.attention_norm(x + self.attention(x, mask))
    return self.ffn_norm(x + self.ffn(x))


class Encoder(nnx.Module):
  """A vector for each token, from all tokens around it."""

  def __init__(self, config, rngs, dtype=None):
    """Builds the blocks.

    Args:
      config: sizes.
      rngs: where the initial weights come from.
      dtype: what the layers compute in; float32 if not given. Weights are float32 always.

    >>> config = Config(vocab_size=100, context_length=16, width=8, layers=2, heads=2, ffn_width=32)
    >>> nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0))(jnp.array([[1, 7, 2]]))).shape
    (1, 3, 8)
    """
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    embed = functools.partial(nnx.Embed, features=config.width, dtype=dtype, rngs=rngs)
    norm = functools.partial(nnx.LayerNorm, config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
    self.config = config
    self.embed, self.position, self.type = embed(config.vocab_size), embed(config.context_length), embed(config.types)
    self.norm = norm()
    self.blocks = nnx.List([Block(config, linear, norm) for _ in range(config.layers)])

  def __call__(self, tokens, mask=None, types=None):
    """Reads whole sequences.

    Args:
      tokens: i32[b, t].
      mask: bool[b, t], False where a token only fills the row; none does if not given.
      types: i32[b, t], the segment of each token; 0 if not given.

    Returns:
      f32[b, t, width]. What stands at a filled place means nothing.
    """
    t = tokens.shape[1]
    if t > self.config.context_length:
      raise ValueError(f'Encoder called on {t} tokens: it was built for {self.config.context_length}. '
                       'Shorten the tokens, or build it with a longer context_length.')
    types = jnp.zeros_like(tokens) if types is None else types
    for name, given in (('mask', mask), ('types', types)):
      if given is not None and given.shape != tokens.shape:
        raise ValueError(f'Encoder called with {name} of shape {given.shape}: the tokens are {tokens.shape}. '
                         'Give one entry a token.')
    x = self.embed(tokens) + self.position(jnp.arange(t))[None] + self.type(types)  # [b, t, width]
    x = self.norm(x)
    for block in self.blocks:
      x = block(x, mask)
    return x


def pool(x, mask):
  """The embedding of each sequence: the mean of its tokens' vectors, of length 1.

  Args:
    x: f32[b, t, width].
    mask: bool[b, t], False where a token only fills the row.

  Returns:
    f32[b, width]; 0 for a row without tokens.

  >>> x, mask = jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]]), jnp.array([[True, True, False]])
  >>> pool(x, mask)
  Array([[0.6, 0.8]], dtype=float32)
  """
  weight = mask.astype(x.dtype)[..., None]                                              # [b, t, 1]
  mean = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
