"""Models of every structure that NNX allows, none of which knows of quantization."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

WIDTH = 8


class Bare(nnx.Module):
  """A Param that is multiplied by `spell(x, p)`."""

  def __init__(self, spell, rngs, dtype=None):
    self.p = nnx.Param(rngs.normal((WIDTH, WIDTH)))
    self.spell = spell

  def __call__(self, x):
    return self.spell(x, self.p)


class OtherMethods(nnx.Module):
  """Its forward goes by methods of its own; the head is another module's Param."""

  def __init__(self, rngs, dtype=None):
    self.first = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.second = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)

  def represent(self, x):
    return nnx.relu(self.first(x))

  def __call__(self, x):
    return self.represent(x) @ self.second.kernel


class Shared(nnx.Module):
  """One module under two names, and one kernel in two layers."""

  def __init__(self, rngs, dtype=None):
    self.a = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.b = self.a
    self.c = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.c.kernel = self.a.kernel

  def __call__(self, x):
    return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


class Tied(nnx.Module):
  """An embedding that is the head as well, by `attend` and by hand."""

  def __init__(self, rngs, dtype=None):
    self.embed = nnx.Embed(16, WIDTH, dtype=dtype, rngs=rngs)

  def __call__(self, tokens):
    x = jnp.tanh(self.embed(tokens))
    return self.embed.attend(x) + x @ self.embed.embedding.T


class Containers(nnx.Module):
  """Layers and Params in List, Dict and Sequential."""

  def __init__(self, rngs, dtype=None):
    linear = functools.partial(nnx.Linear, WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.stack = nnx.Sequential(linear(), nnx.relu, linear())
    self.named = nnx.Dict({'up': linear(), 'down': nnx.Param(rngs.normal((WIDTH, WIDTH)))})
    self.params = nnx.List([nnx.Param(rngs.normal((WIDTH, WIDTH))) for _ in range(2)])

  def __call__(self, x):
    x = self.named['up'](self.stack(x)) @ self.named['down']
    for p in self.params:
      x = jnp.tanh(x @ p)
    assert sorted(self.named) == ['down', 'up'] and len(self.params) == 2
    return x


class PlainContainers(nnx.Module):
  """Layers in plain lists and dicts."""

  def __init__(self, rngs, dtype=None):
    linear = functools.partial(nnx.Linear, WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.layers = nnx.data([linear(), {'last': linear()}])
    self.gains = nnx.data((nnx.Param(jnp.ones((1, WIDTH))),))

  def __call__(self, x):
    return self.layers[1]['last'](nnx.relu(self.layers[0](x))) * self.gains[0].astype(x.dtype)


class Block(nnx.Module):
  """Of a stack: a layer, a Param and a gain."""

  def __init__(self, rngs, dtype=None):
    self.linear = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.p = nnx.Param(rngs.normal((WIDTH, WIDTH)))
    self.norm = nnx.RMSNorm(WIDTH, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return x + jnp.tanh(self.linear(self.norm(x))) @ self.p[...].astype(x.dtype)


class Scanned(nnx.Module):
  """Three Blocks in one array, made by nnx.vmap and run by nnx.scan."""

  def __init__(self, rngs, dtype=None):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
      return Block(rngs, dtype)
    self.blocks = make(rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
      return block(x)
    return run(self.blocks, x)


class Ensemble(nnx.Module):
  """Three layers side by side, each with the same input."""

  def __init__(self, rngs, dtype=None):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
      return nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.layers = make(rngs)

  def __call__(self, x):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


class Remat(nnx.Module):

  def __init__(self, rngs, dtype=None):
    self.block = Block(rngs, dtype)

  def __call__(self, x):
    return nnx.remat(lambda block, x: block(x))(self.block, x)


class OwnForward(nnx.Linear):
  """A Linear that multiplies by itself, out of reach of `dot_general`."""

  def __call__(self, x):
    return x @ self.kernel + self.bias[None]


class Wrapped(nnx.Linear):
  """A Linear that calls the one it extends."""

  def __call__(self, x):
    return super().__call__(x) * 2


class Subclasses(nnx.Module):

  def __init__(self, rngs, dtype=None):
    self.own = OwnForward(WIDTH, WIDTH, rngs=rngs)
    self.wrapped = Wrapped(WIDTH, WIDTH, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.wrapped(nnx.relu(self.own(x)))


class Oddities(nnx.Module):
  """Integer and one-dimensional Params, a layer called twice, dropout, a norm over a batch."""

  def __init__(self, rngs, dtype=None):
    self.table = nnx.Param(jnp.arange(WIDTH * WIDTH, dtype=jnp.int8).reshape(WIDTH, WIDTH))
    self.gain = nnx.Param(jnp.ones(WIDTH))
    self.linear = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.norm = nnx.BatchNorm(WIDTH, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    gain = (self.gain[...] + self.table[0]).astype(x.dtype)
    return self.dropout(self.norm(self.linear(self.linear(x)))) * gain.reshape(1, -1)


class Attention(nnx.Module):
  """Multi-head attention under a mask, with fewer heads of keys than of queries."""

  def __init__(self, rngs, dtype=None):
    self.attention = nnx.MultiHeadAttention(
        4, WIDTH, num_kv_heads=2, decode=False, dropout_rate=0.5, deterministic=True, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.attention(x[None], mask=nnx.make_causal_mask(jnp.ones((1, x.shape[0]))))


SPELLINGS = {
    '@': lambda x, p: x @ p, 'jnp.dot': lambda x, p: jnp.dot(x, p[...]),
    'jnp.matmul': lambda x, p: jnp.matmul(x, p[...]),
    'jnp.einsum': lambda x, p: jnp.einsum('bi,io->bo', x, p[...]), '.T': lambda x, p: (p.T @ x.T).T,
    'jax.lax.dot': lambda x, p: jax.lax.dot(x, p.get_value()),
    'vmap': lambda x, p: jax.vmap(lambda row: row @ p[...])(x)}
MODELS = {'bare ' + name: functools.partial(Bare, spell) for name, spell in SPELLINGS.items()} | {
    'other methods': OtherMethods, 'shared': Shared, 'tied': Tied, 'containers': Containers,
    'plain containers': PlainContainers,
    'scanned': Scanned,
    'ensemble': Ensemble, 'remat': Remat, 'subclasses': Subclasses, 'oddities': Oddities, 'attention': Attention}


def example(name, dtype=jnp.float32):
  """An input of a model."""
  return jnp.arange(6) * 2 if name == 'tied' else jax.random.normal(jax.random.key(1), (6, WIDTH), dtype)
