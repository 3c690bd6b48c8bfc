"""Moments: what the solvers know of the inputs of a layer.

They are sums over the rows x[n, k] that the layer's product reads, so batches can be added one after
another, and the inputs themselves need not be kept.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over rows x[n, k]. A batch of products has leading axes on every field.

  Attributes:
    count: i32[], rows seen.
    second: f32[k, k], the sum of x^T x.
    absolute: f32[k], the sum of |x|.
    largest: f32[k], max |x|.
  """
  count: jax.Array
  second: jax.Array
  absolute: jax.Array
  largest: jax.Array

  @classmethod
  def zeros(cls, k, lead=()):
    """Of no rows."""
    return cls(jnp.zeros(lead, jnp.int32), jnp.zeros((*lead, k, k)), jnp.zeros((*lead, k)), jnp.zeros((*lead, k)))

  @classmethod
  def of(cls, x):
    """Of rows float[*lead, n, k].

    >>> Moments.of(jnp.array([[1., 2.], [3., -4.]])).H
    Array([[ 5., -5.],
           [-5., 10.]], dtype=float32)
    """
    return cls.zeros(x.shape[-1], x.shape[:-2]).add(x)

  def add(self, x):
    """These, and rows float[*lead, n, k] more."""
    x = x.astype(jnp.float32)
    second = jnp.einsum('...nk,...nl->...kl', x, x, precision=jax.lax.Precision.HIGHEST)
    return Moments(self.count + jnp.int32(x.shape[-2]), self.second + second,
                   self.absolute + jnp.sum(jnp.abs(x), -2), jnp.maximum(self.largest, jnp.max(jnp.abs(x), -2)))

  @classmethod
  def ranks(cls):
    """The axes of each field, of one product."""
    return cls(0, 2, 1, 1)

  @property
  def H(self):
    """The mean of x^T x: f32[k, k], half the Hessian of a layer's squared output error."""
    return self.second / jnp.maximum(self.count, 1).astype(jnp.float32)[..., None, None]

  @property
  def mean_abs(self):
    """The mean of |x| of each input: f32[k]."""
    return self.absolute / jnp.maximum(self.count, 1).astype(jnp.float32)[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drifted(Moments):
  """Moments of the rows x~ that a quantized model feeds a layer, and how they go with those of the float model, x.

  Attributes:
    cross: f32[k, k], the sum of x~^T x.
  """
  cross: jax.Array

  @classmethod
  def ranks(cls):
    return cls(0, 2, 1, 1, 2)

  @property
  def G(self):
    """The mean of x~^T x: f32[k, k]."""
    return self.cross / jnp.maximum(self.count, 1).astype(jnp.float32)[..., None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows themselves, f32[*lead, n, k], in place of their Moments."""
  rows: jax.Array

  @classmethod
  def zeros(cls, k, lead=()):
    """None."""
    return cls(jnp.zeros((*lead, 0, k)))

  def add(self, x):
    """These, and rows float[*lead, n, k] more."""
    return Rows(jnp.concatenate([self.rows, x.astype(jnp.float32)], -2))
