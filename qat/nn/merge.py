"""Merging: a model without adapters that computes what the model with them does.

`merge` leaves floats where adapters were. `merge_pooled` leaves codes: those of the base, byte for byte, whose zeros
have moved. qat/ptq/merge.py puts the floats back on their grid by a solver.

Xu et al. QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, ICLR 2024.
https://arxiv.org/abs/2309.14717
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.nn import adapted, adapters, lora, quantized, weights


def merge(model):
  """A copy of `model` that has floats, W + sum of s A B over the active adapters, where it had adapters.

  These layers have no weight quantizer any more; their other quantizers stay, as do layers without an active adapter.
  Adapters that are not active are dropped.
  """
  model, merged = nnx.clone(model), {}
  for site in lora.sites(model):
    used = adapted.active(site.module, site.name)
    if used and id(site.variable) not in merged:
      w = adapters.merged(adapted.matrix(adapted.base(site.module), site.name), used)
      dtype = getattr(adapted.base(site.module), site.name).dtype
      merged[id(site.variable)] = nnx.Param(site.layout.from_matrix(w).astype(dtype))
  _replace(model, merged)
  return model


def merge_pooled(model):
  """A copy of `model` whose active adapters, all over pooled inputs, are in the zeros of their bases: QA-LoRA's merge.

  The numbers are those of W + s A B up to the rounding of float32; codes and scales stay. A grid without a zero gets a
  float Min.
  """
  model, merged = nnx.clone(model), {}
  for site in lora.sites(model):
    used = adapted.active(site.module, site.name)
    if used and id(site.variable) not in merged:
      merged[id(site.variable)] = weights.Codes(_pooled(site, used))
  _replace(model, merged)
  return model


def shift(q, delta, group):
  """The array q + repeat(delta, group, axis=0), as the codes of q under other zeros.

  QA-LoRA, Algorithm 1: beta <- beta - s (B A)^T / alpha, in its letters.

  Args:
    q: QArray[in, out], with a scale for each block of (b, 1); b divides `group`.
    delta: f32[in / group, out].
    group: of inputs that share a row of delta.

  Returns:
    QArray[in, out], whose zero is in floats.
  """
  b = _inputs_a_block(q, group)
  delta = jnp.repeat(delta, group // b, axis=0)                          # [in / b, out]
  scale, zero = qarray.decode(q.scale), qarray.decode(q.zero)
  if isinstance(q.spec.zero, qarray.Zero):
    # A scale of 0 leaves no number but 0. Its codes are its zero, so that any other scale serves as well.
    flat, units = scale == 0, delta * jnp.where(scale == 0, 1, 1 / jnp.where(scale == 0, 1, scale))
    kept = q.scale if isinstance(q.scale, qarray.QArray) else jnp.where(flat, 1, scale)
    return qarray.QArray(q.codes, kept, zero - units, dataclasses.replace(q.spec, zero=qarray.Zero()))
  moved = delta if zero is None else zero + delta
  return qarray.QArray(q.codes, q.scale, moved, dataclasses.replace(q.spec, zero=qarray.Min()))


def _inputs_a_block(q, group):
  """How many inputs share a scale; raises if more than `group`, or more than one output."""
  spec = q.spec
  rows, columns = spec.block if isinstance(spec.block, tuple) and len(spec.block) == 2 else (0, 0)
  rows = q.shape[0] if rows is None else rows
  if columns != 1 or not rows or group % rows:
    raise ValueError(f'Sums over groups of {group} inputs do not merge into {spec}: each output of such a group must '
                     'have zeros of its own. Train with a `group` that b divides, on a grid of blocks (b, 1).')
  return rows


def _pooled(site, used):
  """The QArray[*lead, in, out] of one site."""
  groups = {a.group for a in used}
  if not isinstance(site.variable, weights.Codes):
    raise ValueError(f"Layer '{site.path}' holds floats, and no zeros to move. Call qat.freeze first, or merge.")
  if 1 in groups or any(a.magnitude is not None for a in used):
    raise ValueError(f"Layer '{site.path}' has an adapter of single inputs, or with magnitudes: it differs within each "
                     'group of the grid, and zeros cannot hold it. Train with LoRA(group=...), or call merge.')

  def one(q, pairs):
    for (A, B), group in zip(pairs, [a.group for a in used]):
      q = shift(q, A @ B, group)
    return q

  q = site.variable.get_value()
  for _ in range(q.ndim - 2):
    one = jax.vmap(one)
  try:
    return one(q, [(a.A.get_value(), a.scaling * a.B.get_value()) for a in used])
  except ValueError as e:
    raise ValueError(f"Layer '{site.path}': {e}") from e


def _replace(model, merged):
  """Puts variables, by the id of the base's, in place of adapted weights, and takes all adapters off, in place."""
  readers = {}
  for _, module in list(quantized.walk(model)):
    if not hasattr(type(module), 'base_class'):
      continue
    names = [n for n in vars(module)['adapters'] if id(vars(module)[n]) in merged]
    adapted.detach(module)
    for name in names:
      key = id(vars(module)[name])
      _reader(module, name, merged[key], readers.setdefault(key, []))
      setattr(module, name, merged[key])


def _reader(module, name, variable, shared):
  """Leaves a quantized layer with what reads `variable`: of codes a Weight, of floats nothing."""
  q = quantized.of(module)
  if q is None:
    return
  old = q.weights[name]
  if isinstance(variable, weights.Codes):
    shared.append(weights.Weight(None, old.layout, old.dtype))
    q.weights[name] = shared[0]
    return
  del q.weights[name]
  if not q.weights and all(getattr(q, slot) is None for slot in ('input', 'output', 'gradient', 'scores')):
    del module.quantizers
    module.__class__ = type(module).float_class
