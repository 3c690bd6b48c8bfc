"""Re-rounding: what adapters have learned stays, more of it with a solver than without."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.models import decoder
from qat.nn import lora, merge as float_merge, weights
from qat.ptq import merge, methods, solvers
from qat.quantizers.ste import STE

NEAREST, GPTQ = (methods.Layerwise(solver) for solver in (solvers.Nearest(), solvers.GPTQ()))


def network():
  return decoder.llama(nnx.Rngs(0), vocab_size=31, context_length=16, width=24, layers=2, heads=2, ffn_width=48)


def texts():
  return [jax.random.randint(jax.random.key(i), (8, 16), 0, 31) for i in range(2)]


@functools.cache
def adapted(bits):
  """A network on groups of 8, in whose feed-forward layers and queries adapters have moved."""
  recipe = [qat.Rule('blocks/.*', weight=STE(specs.integer(bits, (8, 1)))), qat.Rule('.*')]
  model = lora.lora(qat.freeze(qat.quantize(network(), recipe)), ['.*/ffn/.*', '.*/q'], 4, 4.0)
  for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(model, lora.LoRAParam))):
    p[...] = jnp.float32(0.15) * jax.random.normal(jax.random.key(i), p.shape)
  return model


@functools.cache
def logits(bits):
  """Of the adapted network on fresh text."""
  return run(adapted(bits))


@nnx.jit
def apply(model, tokens):
  return model(tokens)


def run(model):
  return np.asarray(apply(model, jax.random.randint(jax.random.key(9), (8, 16), 0, 31)))


@pytest.mark.parametrize('bits', [4, 2])
def test_a_solver_loses_less_than_rounding_to_nearest(bits):
  model = adapted(bits)
  error = {}
  for name, method in dict(nearest=NEAREST, gptq=GPTQ).items():
    merged, coverage = merge.reround(model, texts(), method)
    error[name] = np.mean((run(merged) - logits(bits)) ** 2)
    assert len(coverage) == 2 * 4 and not lora.sites(merged)
    kernel = vars(merged.blocks[0].ffn.up)['kernel']
    assert isinstance(kernel, weights.Codes) and kernel.get_value().spec == specs.integer(bits, (8, 1))
  assert error['gptq'] < 0.9 * error['nearest'], error


def test_layers_without_adapters_keep_their_codes():
  merged, _ = merge.reround(adapted(4), texts(), NEAREST)
  of = lambda model: vars(model.blocks[1].attention.k)['kernel'].get_value()
  for a, b in zip(jax.tree.leaves(of(merged)), jax.tree.leaves(of(adapted(4))), strict=True):
    np.testing.assert_array_equal(a, b)


def test_rounding_to_nearest_is_freezing_the_merged_floats():
  merged, _ = merge.reround(adapted(4), texts(), NEAREST)
  floats = float_merge.merge(adapted(4))
  recipe = [qat.Rule('.*/ffn/.*|.*/q', weight=STE(specs.integer(4, (8, 1))))]
  np.testing.assert_array_equal(run(merged), run(qat.freeze(qat.quantize(floats, recipe))))


def test_what_has_no_grid_or_no_adapter_is_an_error():
  with pytest.raises(ValueError, match='adapters on floats, which are on no grid'):
    merge.reround(lora.lora(network(), ['.*/q'], 2, 1.0), texts(), NEAREST)
  with pytest.raises(ValueError, match=r"No adapter is active.*\['default'\]"):
    merge.reround(lora.activate(adapted(4)), texts(), NEAREST)
