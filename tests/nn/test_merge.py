"""Merging: the same function without adapters; QA-LoRA's moves zeros and no code."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import qat
from qat.core import formats, qarray, ranges, specs
from qat.nn import lora, merge, quantized, weights
from qat.quantizers.ste import STE
from tests.nn import zoo
from tests.nn.test_lora import randomized

HALF = qarray.Spec(formats.UINT4, (8, 1), specs.F16, qarray.Min(specs.F16))
GRIDS = {'integer zero': specs.affine(4, (8, 1)), 'float zero': qarray.Spec(formats.UINT2, (8, 1), zero=qarray.Zero()),
         'minimum': HALF, 'no zero': specs.integer(3, (8, 1)), 'power-of-two scale': specs.kernel(specs.MXFP4),
         'one block an output': specs.affine(2, (None, 1))}


def decoded(q):
  """What codes stand for, in float64, whatever kind of zero they have."""
  value = np.asarray(q.spec.format.decode(q.codes), np.float64)
  each = lambda a: np.repeat(np.asarray(qarray.decode(a), np.float64), value.shape[0] // a.shape[0], axis=0)
  if q.zero is None:
    return value * each(q.scale)
  if isinstance(q.spec.zero, qarray.Zero):
    return (value - each(q.zero)) * each(q.scale)
  return value * each(q.scale) + each(q.zero)


@pytest.mark.parametrize('name', GRIDS)
def test_shift_is_exact_in_float64(name):
  """(codes - zero') scale == (codes - zero) scale + s A B, to 1e-12; codes and scales are the same bytes."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    q = qarray.encode(jnp.asarray(rng.standard_normal((64, 5)), jnp.float32), GRIDS[name])
    wide = lambda a: None if a is None else jnp.asarray(qarray.decode(a), jnp.float64)
    q = qarray.QArray(q.codes, wide(q.scale), wide(q.zero), q.spec)
    delta = rng.standard_normal((1 if name == 'one block an output' else 64 // 32, 5))
    moved = merge.shift(q, jnp.asarray(delta), 64 // len(delta))
    want = decoded(q) + np.repeat(delta, 64 // len(delta), axis=0)
    np.testing.assert_allclose(decoded(moved), want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(moved.codes, q.codes)
    np.testing.assert_array_equal(moved.scale, q.scale)
    assert moved.spec.zero.spec is None                                    # Floats.


def test_a_block_of_zeros_can_move():
  q = qarray.encode(jnp.zeros((8, 2)).at[:, 1].set(jnp.linspace(-1, 1, 8)), specs.affine(4, (8, 1)))
  moved = merge.shift(q, jnp.asarray([[0.3, 0.5]]), 8)
  np.testing.assert_allclose(qarray.decode(moved), qarray.decode(q) + jnp.asarray([[0.3, 0.5]]), atol=1e-6)


@pytest.mark.parametrize('spec, group', [(specs.kernel(specs.NF4), 64), (specs.integer(4, (8, 1)), 4),
                                         (specs.integer(4, (8, 2)), 8), (specs.integer(4, specs.TENSOR), 8)])
def test_groups_of_other_zeros_are_errors(spec, group):
  q = qarray.encode(jnp.ones((64, 4)), spec)
  with pytest.raises(ValueError, match=f'groups of {group} inputs do not merge into'):
    merge.shift(q, jnp.ones((64 // group, 4)), group)


@functools.cache
def pooled():
  """Stacked and shared layers on affine grids, with pooled adapters, and their merges."""
  found = {}
  for name in ('scanned', 'shared', 'tied'):
    kernels = zoo.MODELS[name](nnx.Rngs(0))
    frozen = qat.freeze(qat.quantize(kernels, [qat.Rule('.*', weight=STE(specs.affine(4, (2, 1))))]))
    model = randomized(lora.lora(frozen, ['.*'], 2, 3.0, group=4))
    found[name] = model, merge.merge_pooled(model)
  return found


@pytest.mark.parametrize('name', ['scanned', 'shared', 'tied'])
def test_a_merged_model_has_the_codes_of_its_base(name):
  model, merged = pooled()[name]
  apply = nnx.jit(lambda model, x: model(x))
  x = zoo.example(name)
  np.testing.assert_allclose(apply(merged, x), apply(model, x), rtol=1e-4, atol=1e-5)
  assert not lora.sites(merged)
  codes = lambda model: [np.asarray(v.get_value().codes) for _, m in quantized.walk(model) for v in vars(m).values()
                         if isinstance(v, weights.Codes)]
  for a, b in zip(codes(model), codes(merged), strict=True):
    np.testing.assert_array_equal(a, b)
  qat.explain(merged)
  with pytest.raises(ValueError, match='is frozen'):
    qat.quantize(merged, [qat.Rule('.*', weight=STE(specs.integer(4, (2, 1))))])


def test_what_zeros_cannot_hold_is_an_error():
  layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
  frozen = qat.freeze(qat.quantize(layer, [qat.Rule('.*', weight=STE(specs.affine(4, (4, 1))))]))
  for model, message in ((lora.lora(frozen, ['.*'], 2, 1.0), 'of single inputs'),
                         (lora.lora(frozen, ['.*'], 2, 1.0, group=4, dora=True), 'with magnitudes'),
                         (lora.lora(layer, ['.*'], 2, 1.0, group=4), 'holds floats, and no zeros'),
                         (lora.lora(frozen, ['.*'], 2, 1.0, group=2), 'groups of 2 inputs do not merge')):
    with pytest.raises(ValueError, match=message):
      merge.merge_pooled(model)


def test_merge_leaves_floats_and_what_has_no_active_adapter():
  model = zoo.Containers(nnx.Rngs(0))
  frozen = qat.freeze(qat.quantize(model, [qat.Rule('.*', weight=STE(specs.integer(4, specs.CHANNEL)))]))
  adapted = randomized(lora.lora(frozen, ['stack/.*'], 2, 2.0))
  merged = merge.merge(adapted)
  first = merged.stack.layers[0]
  assert type(first) is nnx.Linear and isinstance(first.kernel, nnx.Param) and first.kernel.dtype == jnp.float32
  assert isinstance(vars(merged.named['up'])['kernel'], weights.Codes)
  off = merge.merge(lora.activate(adapted))
  assert isinstance(vars(off.stack.layers[0])['kernel'], weights.Codes) and not lora.sites(off)
  x = zoo.example('containers')
  np.testing.assert_array_equal(off(x), frozen(x))
  assert lora.names(adapted) == ['default']                                # The model that was given stays.


def test_adapters_and_codes_come_back_from_a_checkpoint(tmp_path):
  rule = qat.Rule('.*', weight=STE(specs.kernel(specs.NF4_DQ), ranges.centered))
  frozen = lambda seed: qat.freeze(qat.quantize(zoo.Scanned(nnx.Rngs(seed)), [rule]))
  model, other = (randomized(lora.lora(frozen(seed), ['.*'], 2, 2.0, dora=True), seed) for seed in (0, 1))
  arrays = lambda model: nnx.to_pure_dict(nnx.state(model))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'model', arrays(model))
    checkpointer.wait_until_finished()
    back = checkpointer.restore(tmp_path / 'model', arrays(other))
  state = nnx.state(other)
  nnx.replace_by_pure_dict(state, back)
  nnx.update(other, state)
  for a, b in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(nnx.state(model)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  x = zoo.example('scanned')
  np.testing.assert_array_equal(other(x), model(x))
