"""Rotary positions: a query and a key are turned by their positions, so that their product knows the distance.

Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021. https://arxiv.org/abs/2104.09864
Names are the paper's: theta_i = base^(-2i/d) is the angle by which pair i turns at each position m (Sec. 3.2.2).

Which features make a pair is a convention. The paper pairs neighbours (2i, 2i+1), as do Llama's own weights and
GGUF files; GPT-NeoX and Hugging Face's weights pair the halves (i, i + d/2). The two differ by a fixed
permutation of the features of each head, so weights must be read with the one that they were trained with.
"""

import collections.abc
import dataclasses

import jax.numpy as jnp


def halves(x, cos, sin):
  """Turns each pair (i, i + d/2): f32[b, t, h, d] by angles of [t, 1, d/2]."""
  a, b = jnp.split(x, 2, axis=-1)  # [b, t, h, d/2] each
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def interleaved(x, cos, sin):
  """Turns each pair (2i, 2i + 1): f32[b, t, h, d] by angles of [t, 1, d/2]."""
  a, b = x[..., 0::2], x[..., 1::2]  # [b, t, h, d/2] each
  return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Rope:
  """How positions turn queries and keys.

  Attributes:
    base: of the angles theta_i = base^(-2i/d).
    turn: `halves` or `interleaved`: which features make a pair.
  """

  base: float = 10000.0
  turn: collections.abc.Callable = halves

  def __call__(self, x, positions):
    """Turns `x` by its positions: f32[b, t, h, d], i32[t] -> f32[b, t, h, d].

    Sines and products are float32 in every dtype: bfloat16 cannot count positions beyond 256.
    """
    d = x.shape[-1]
    if d % 2:
      raise ValueError(
          f'Rope on heads of {d} features: features are turned in pairs. Choose an even head_dim.')
    theta = self.base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)  # [d/2]
    angles = jnp.outer(positions.astype(jnp.float32), theta)[None, :, None, :]  # [1, t, 1, d/2]
    return self.turn(x.astype(jnp.float32), jnp.cos(angles), jnp.sin(angles)).astype(x.dtype)
