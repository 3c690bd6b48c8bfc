"""Histograms of magnitudes, which grow with the numbers they see.

`counts` is f32[2, bins]: the negative numbers and the others, by |x|, over [0, top). When a
number above `top` comes, `top` doubles until it fits and neighbouring bins merge, so that nothing
is counted twice or guessed.
"""

import jax
import jax.numpy as jnp

from qat.core import qarray


def count(x, top, bins):
  """f32[2, bins]: how many x < 0 and x >= 0 there are in each bin of |x|; `top` is in the last."""
  place = jnp.abs(x) * (bins * qarray.reciprocal(top))
  place = jnp.clip(place.astype(jnp.int32), 0, bins - 1) + jnp.where(x < 0, 0, bins)
  return jnp.zeros(2 * bins).at[place.ravel()].add(1).reshape(2, bins)


def grow(counts, top, amax):
  """`counts` over [0, top'), and the top' that holds `amax`: `amax` itself the first time."""
  ratio = jnp.where(top > 0, amax * qarray.reciprocal(top), jnp.ones_like(top))
  bits = jax.lax.bitcast_convert_type(ratio, jnp.int32) + (2**23 - 1)
  doublings = jnp.clip((bits >> 23) - 127, 0, 30)                        # ceil(log2(ratio))
  doublings = jnp.where(_doubled(top, doublings) < amax, doublings + 1, doublings)
  doublings = jnp.where(top > 0, doublings, 0)
  bins = counts.shape[1]
  merged = jnp.zeros_like(counts).at[:, jnp.arange(bins) >> doublings].add(counts)
  return merged, jnp.where(top > 0, _doubled(top, doublings), amax)


def _doubled(top, times):
  return top * jax.lax.bitcast_convert_type((times + 127) << 23, jnp.float32)


def quantile(counts, share):
  """Where `share` of the counts lie below, in bins, linear within a bin: f32[n] -> f32[]."""
  below = jnp.cumsum(counts)
  goal = share * below[-1]
  i = jnp.minimum(jnp.searchsorted(below, goal), len(counts) - 1)
  rest = goal - (below[i] - counts[i])
  return i.astype(jnp.float32) + jnp.clip(rest * qarray.reciprocal(counts[i]), 0, 1)


def least_divergence(counts, levels):
  """The number of bins to keep, i, for which the kept numbers resemble their quantized selves most.

  Migacz. 8-bit Inference with TensorRT, GTC 2017, slides 38-40. P: the first i bins, and all
  others in the last of them. Q: the first i bins, merged into `levels` equal groups, and each
  group spread evenly over its non-empty bins. i minimizes KL(P || Q); of equals the largest, as
  in NVIDIA's Model Optimizer, which also counts bin 0 like bin 1, for zeros are exact on any grid.

  Args:
    counts: f32[bins] of |x|.
    levels: of the grid above zero: 128 for int8.
  """
  bins = len(counts)
  counts = counts.at[0].set(counts[1])
  place = jnp.arange(bins)

  def divergence(i):
    kept = jnp.where(place < i, counts, 0)
    group = jnp.where(place < i, place * levels // i, levels)
    mass = jnp.zeros(levels + 1).at[group].add(kept)
    filled = jnp.zeros(levels + 1).at[group].add((kept > 0).astype(jnp.float32))
    q = jnp.where(kept > 0, (mass * qarray.reciprocal(filled))[group], 0)
    p = jnp.where(place == i - 1, kept + jnp.sum(jnp.where(place < i, 0, counts)), kept)
    p, q = p * qarray.reciprocal(p.sum()), q * qarray.reciprocal(q.sum())
    term = p * jnp.log(jnp.where(p > 0, p, 1) * qarray.reciprocal(jnp.where(q > 0, q, 1)))
    return jnp.where(jnp.any((p > 0) & (q == 0)), jnp.inf, jnp.sum(jnp.where(p > 0, term, 0)))

  candidates = jnp.arange(levels, bins + 1)
  divergences = jax.lax.map(divergence, candidates)
  last = len(candidates) - 1 - jnp.argmin(divergences[::-1])
  return candidates[last].astype(jnp.float32)
