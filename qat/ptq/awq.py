"""AWQ: scale up the weights of inputs that are large, so that rounding harms them less; then clip the ranges.

Lin et al. AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, MLSys 2024.
https://arxiv.org/abs/2306.00978

Differences from the paper and its code: the error is that of the layers which read the scaled inputs, where the
code runs the whole block; and it is tr(dW^T H dW) / i, by the second moments H of all calibration rows, where the
code keeps a sample of them: for a linear layer these are equal, for rows that both see. Likewise the clip search takes
each block's own part of H.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qat.core import blocks, qarray, ranges
from qat.ptq import channels, links as links_

# The code's (auto_scale.py, auto_clip.py).
STEPS, LEAST, MOST_SHRINK = 20, 1e-4, 0.5


def search(ws, moments, spec, rule=ranges.absmax):
  """The factors s = mean|x|^r under which round to nearest does least harm (Eqs. 4-5).

  Args:
    ws: list of f32[i, o_j], the weights that read the same inputs.
    moments: their Moments.
    spec: the grid of the weights.
    rule: the range rule of their scales.

  Returns:
    f32[i], with the weights to be multiplied by it; geometric mean of its ends 1. r is one of 20 in [0, 1); of equal
    errors the least r, so that the result is never worse than s = 1.
  """
  return _search(tuple(w.astype(jnp.float32) for w in ws), moments.H, moments.mean_abs, spec, rule)


@functools.partial(jax.jit, static_argnames=('spec', 'rule'))
def _search(ws, H, mean_abs, spec, rule):
  def error(s):
    total = jnp.float32(0)
    for w in ws:
      scaled = w * s[:, None]
      wrong = qarray.fake(scaled, spec, *_fit(rule, scaled, spec)) / s[:, None] - w
      total += jnp.sum(wrong * jnp.matmul(H, wrong, precision='highest'))
    return total

  def step(best, r):
    s = power(mean_abs, r)
    now = error(s)
    return jax.tree.map(lambda a, b: jnp.where(now < best[1], a, b), (s, now), best), None

  first = jnp.ones_like(mean_abs)
  (s, _), _ = jax.lax.scan(step, (first, error(first)), np.arange(1, STEPS, dtype=np.float32) / np.float32(STEPS))
  return s


def power(mean_abs, r):
  """mean|x|^r, at least 1e-4, over sqrt(max min) of it: f32[i]."""
  s = jnp.maximum(mean_abs ** r, LEAST)
  return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


@functools.partial(jax.jit, static_argnames='spec')
def clip(w, moments, spec):
  """The range of each block, shrunken by up to a half, whose output error is least.

  A block's error is that of its own inputs: sum dW_g^T H_gg dW_g over its outputs.

  Args:
    w: f32[i, o].
    moments: Moments of its inputs.
    spec: the grid.

  Returns:
    scale and zero, each [*w.shape / block] and on its own grid.
  """
  low, high = ranges.extent(w.astype(jnp.float32), spec)
  first = qarray.from_range(low, high, spec)
  H = _own_part(moments.H, spec, w.shape)                                # [i / g, g, g]

  def error(r):
    scale, zero = qarray.from_range(*ranges.shrink(low, high, r, spec), spec, under=first)
    wrong = (qarray.fake(w, spec, scale, zero) - w).reshape(*H.shape[:2], -1)
    each = jnp.sum(wrong * jnp.einsum('agh,aho->ago', H, wrong, precision='highest'), 1)
    return jnp.sum(each.reshape(*low.shape, -1), -1) if low.ndim == 2 else each.T.reshape(low.shape)

  ratios = ranges.Search(lowest=1 - MOST_SHRINK + 1 / STEPS, steps=int(MOST_SHRINK * STEPS))
  r = ratios.best(error, low.shape)
  return qarray.from_range(*ranges.shrink(low, high, r, spec), spec, under=first)


def _own_part(H, spec, shape):
  """The blocks of H along its diagonal, one for each run of inputs that share a scale: f32[i / g, g, g]."""
  if isinstance(spec.block, blocks.Flat):
    rows = spec.block.size
    if not spec.block.columns or shape[0] % rows:
      raise ValueError(f'{spec} blocks a weight of {shape[0]} inputs across its outputs: a clip search needs blocks '
                       'that lie along the inputs. Give Flat(size, columns=True) with a size that divides them.')
  else:
    rows = blocks.tile(spec.block, shape)[0]
  parts = H.reshape(shape[0] // rows, rows, shape[0] // rows, rows)
  return jnp.moveaxis(jnp.diagonal(parts, axis1=0, axis2=2), -1, 0)


def _fit(rule, w, spec):
  return (None, None) if spec.block is None else rule(w, spec)


@dataclasses.dataclass(frozen=True)
class Clipped:
  """A solver: round to nearest within ranges of `clip`. The paper's code leaves q and k unclipped."""

  def __call__(self, w, moments, spec):
    return qarray.encode(w, spec, *((None, None) if spec.block is None else clip(w, moments, spec))), {}


def awq(model, moments, links, spec, rule=ranges.absmax):
  """A copy of a model, or of a block of it, with the same outputs and weights that round better.

  Args:
    model: in floats.
    moments: {path: Moments} of the targets of `links`, and of any layers more.
    links: of `links.find` or `links.resolve`, in the order of the computation.
    spec: the grid of the weights, and `rule` the range rule of their scales.

  Returns:
    The model, and the Moments of its own inputs.
  """
  moments = dict(moments)
  for link in links:
    if missing := [path for path in link.targets if path not in moments]:
      raise ValueError(f'{link}: there are no moments of {missing}, only of {list(moments)}. Gather them on '
                       'calibration batches.')
    shape = links_.size(model, link)
    if len(shape) != 1:
      raise ValueError(f"{link}: '{link.source}' is a stack of {shape[:-1]} layers, each of which has factors of its "
                       'own. Unstack them.')
    ws = [channels.inputs(channels.find(model, path), path) for path in link.targets]
    rows = lambda s: links_.spread(s, len(ws[0]), link.run)
    tied = lambda a: links_.gather(a, shape[0], link.run, jnp.mean)      # Heads that share a value share factors.
    seen = moments[link.targets[0]]
    seen = dataclasses.replace(seen, absolute=rows(tied(seen.absolute)))
    s = tied(search(ws, seen, spec, rule))
    model = links_.rescale(model, {link: s})
    moments |= {path: scaled(moments[path], rows(s)) for path in link.targets}
  return model, moments


def scaled(moments, s):
  """The Moments of x / s."""
  return dataclasses.replace(moments, second=moments.second / (s[:, None] * s[None, :]),
                             absolute=moments.absolute / s, largest=moments.largest / s)
