"""Rotary positions: a query and a key are turned by their positions, so that their product knows the distance.

Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021. https://arxiv.org/abs/2104.09864
Names are the paper's: theta_i = base^(-2i/d) is the angle by which pair i turns at each position m (Sec. 3.2.2).

Which features make a pair is a convention. The paper pairs neighbours (2i, 2i+1), as do Llama's own weights and
GGUF files; GPT-NeoX and Hugging Face's weights pair the halves (i, i + d/2). The two differ by a fixed
permutation of the features of each head, so weights must be read with the one that they were trained with.

Models that read further than they were trained to divide the angles: all by one number (Chen et al. Extending
Context Window of Large Language Models via Positional Interpolation, 2023. https://arxiv.org/abs/2306.15595), or each
by its own, as Llama 3.1 does.
"""

import collections.abc
import dataclasses
import math

import jax.numpy as jnp
import numpy as np


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
    divisors: of the angles; one number, or one for each of the d/2 pairs.
  """

  base: float = 10000.0
  turn: collections.abc.Callable = halves
  divisors: float | tuple[float, ...] = 1.0

  def __call__(self, x, positions):
    """Turns `x` by its positions: f32[b, t, h, d], i32[t] -> f32[b, t, h, d].

    Sines and products are float32 in every dtype: bfloat16 cannot count positions beyond 256.
    """
    d = x.shape[-1]
    if d % 2:
      raise ValueError(
          f'Rope on heads of {d} features: features are turned in pairs. Choose an even head_dim.')
    divisors = np.asarray(self.divisors, np.float32)  # [] or [d/2]
    if divisors.shape not in ((), (d // 2,)):
      raise ValueError(
          f'Rope.divisors of {divisors.size} numbers on heads of {d} features: there are {d // 2} pairs. Give a number '
          'for each, or one for all.')
    theta = self.base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d) / np.broadcast_to(divisors, (d // 2,))  # [d/2]
    angles = jnp.outer(positions.astype(jnp.float32), theta)[None, :, None, :]  # [1, t, 1, d/2]
    return self.turn(x.astype(jnp.float32), jnp.cos(angles), jnp.sin(angles)).astype(x.dtype)


def llama3_divisors(base, d, factor, low_freq_factor, high_freq_factor, original_context_length):
  """What Llama 3.1 divides its angles by: long waves by `factor`, short ones not at all, and smoothly between.

  Dubey et al. The Llama 3 Herd of Models, 2024. https://arxiv.org/abs/2407.21783. The constants and their use are those
  of the released code, https://github.com/meta-llama/llama-models (`apply_scaling`); the arguments keep its names.

  Args:
    base, d: of the Rope, and the features of a head.
    factor: of the longest waves.
    low_freq_factor, high_freq_factor: waves that turn fewer times than the first within the original context are
      divided by `factor`, and those that turn more often than the second are kept.
    original_context_length: tokens.

  Returns:
    d/2 numbers, for Rope.divisors.

  >>> [round(x, 3) for x in llama3_divisors(100.0, 8, 8.0, 1.0, 4.0, 128)]
  [1.0, 1.0, 2.339, 8.0]
  """
  divisors = []
  for i in range(d // 2):
    turns = original_context_length * base ** (-2 * i / d) / (2 * math.pi)
    smooth = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
    divisors.append(1 / ((1 - smooth) / factor + smooth))
  return tuple(divisors)
