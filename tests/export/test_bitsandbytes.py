"""bitsandbytes' 4-bit layout; onnxruntime has an encoder of its own, and the peers' test asks bitsandbytes."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from onnxruntime.capi import _pybind_state as ort
import pytest
from safetensors.numpy import load_file

from qat.core import qarray, ranges, specs
from qat.core.blocks import Flat
from qat.export import bitsandbytes
from qat.models import decoder
from qat.models import rope
from qat.models.pretrained import families
from qat.nn import recipes, rules, transform, weights

FAMILY = families.FAMILIES['llama']
TOKENS = jnp.arange(12).reshape(2, 6) % 32
W = np.random.default_rng(0).standard_normal((256, 96)).astype(np.float32)  # [in, out]
GRIDS = dict(nf4=(specs.NF4, ranges.absmax), fp4=(specs.FP4_BNB, ranges.absmax), nf4_dq=(specs.NF4_DQ, ranges.centered))


def encoded(name, w=W, size=64):
  spec, rule = GRIDS[name]
  spec = qarray.dataclasses.replace(spec, block=Flat(size, columns=True))
  return jax.jit(lambda w: qarray.encode(w, spec, *rule(w, spec)))(jnp.asarray(w))


@pytest.mark.parametrize('name', ['nf4', 'fp4'])
@pytest.mark.parametrize('size', [64, 128, 256])
def test_bytes_are_onnxruntimes(name, size):
  rows = np.ascontiguousarray(W.T)  # [out, in], as files have it.
  data, absmax = np.zeros(W.size // 2, np.uint8), np.zeros(W.size // size, np.float32)
  ort.quantize_matmul_bnb4(data, rows, absmax, size, dict(nf4=1, fp4=0)[name], *rows.shape)
  parts = bitsandbytes.tensors(encoded(name, size=size))
  np.testing.assert_array_equal(parts['.absmax'], absmax)
  levels = parts['.quant_map']
  nibbles = lambda b: levels[np.stack([b >> 4, b & 15], -1).ravel()]     # FP4 has two zeros: numbers are compared.
  np.testing.assert_array_equal(nibbles(parts[''].ravel()), nibbles(data))


@pytest.mark.parametrize('name', GRIDS)
def test_there_and_back(name):
  q = encoded(name)
  again = bitsandbytes.qarray(bitsandbytes.tensors(q))
  assert jax.tree.structure(again) == jax.tree.structure(q)
  jax.tree.map(np.testing.assert_array_equal, again, q)


def test_the_state_is_theirs():
  parts = bitsandbytes.tensors(encoded('nf4_dq'))
  state = json.loads(bytes(parts['.quant_state.bitsandbytes__nf4']))
  state.pop('nested_offset')
  assert state == dict(
      quant_type='nf4', blocksize=64, shape=[96, 256], nested_blocksize=256, nested_dtype='float32', dtype='float32')
  assert parts['.absmax'].dtype == np.uint8 and parts[''].shape == (W.size // 2, 1)


def test_other_grids_are_refused():
  with pytest.raises(ValueError, match="'nf4_dq'"):
    bitsandbytes.tensors(qarray.encode(jnp.asarray(W), specs.integer(4, (64, 1))))
  with pytest.raises(ValueError, match='columns'):
    bitsandbytes.tensors(qarray.encode(jnp.asarray(W), specs.NF4))


def network(turn=rope.halves, seed=0, **sizes):
  form = dict(vocab_size=32, context_length=16, width=32, layers=2, heads=4, kv_heads=2, rope=rope.Rope(turn=turn))
  return decoder.llama(nnx.Rngs(seed), **(form | sizes))


def frozen(name='nf4_dq', **settings):
  recipe = [*recipes.at(r'blocks/.*', recipes.get(name)), rules.Rule('.*')]
  return transform.freeze(transform.quantize(network(**settings), recipe))


def scores(model):
  return np.asarray(nnx.jit(lambda m: m(TOKENS))(model))


def test_a_model_is_loaded_bit_for_bit(tmp_path):
  model, path = frozen(), tmp_path / 'model.safetensors'
  bitsandbytes.save(model, path, FAMILY)
  loaded = bitsandbytes.load(network(seed=1), path, FAMILY)
  np.testing.assert_array_equal(scores(loaded), scores(model))
  codes = lambda m: [x for x in jax.tree.leaves(nnx.state(m, weights.Codes))]
  jax.tree.map(np.testing.assert_array_equal, codes(loaded), codes(model))
  assert 'model.layers.1.self_attn.k_proj.weight.absmax' in load_file(path)


def test_neighbours_become_halves():
  model = network(rope.interleaved)
  np.testing.assert_allclose(scores(decoder.halved(model)), scores(model), atol=1e-5)
  assert np.abs(scores(decoder.halved(model)) - scores(network(rope.halves))).max() > 1e-3
  with pytest.raises(ValueError, match='codes'):
    decoder.halved(frozen(turn=rope.interleaved))


def test_bad_files_and_models(tmp_path):
  path = tmp_path / 'model.safetensors'
  with pytest.raises(ValueError, match='halved'):
    bitsandbytes.save(frozen(turn=rope.interleaved), path, FAMILY)
  with pytest.raises(ValueError, match='cannot be read'):
    bitsandbytes.load(network(), path, FAMILY)
  bitsandbytes.save(frozen(), path, FAMILY)
  with pytest.raises(ValueError, match='already'):
    bitsandbytes.save(frozen(), path, FAMILY)
  with pytest.raises(ValueError, match='another model'):
    bitsandbytes.load(network(ffn_width=64), path, FAMILY)
  with pytest.raises(ValueError, match='another model'):
    bitsandbytes.load(network(layers=3), path, FAMILY)
  data = path.read_bytes()
  path.write_bytes(data[:-100])
  with pytest.raises(ValueError, match='cannot be read'):
    bitsandbytes.load(network(), path, FAMILY)
