"""Packed bytes against the bits that shapes imply, a file on disk, and arithmetic by hand."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, packing, qarray, specs
from qat.evals import size
from qat.nn import explain, recipes, rules, transform
from qat.quantizers import ste
from tests.nn import zoo

W = jax.random.normal(jax.random.key(0), (256, 6))
SPECS = [specs.integer(3, (64, 1)), specs.affine(4, (32, 1)), specs.kernel(specs.MXFP4), specs.kernel(specs.NVFP4),
         specs.kernel(specs.NF4_DQ), specs.kernel(specs.Q4_K), specs.kernel(specs.Q6_K), specs.kernel(specs.Q4_0),
         specs.kernel(specs.MXFP6), qarray.Spec(formats.TERNARY, (None, 1)), qarray.Spec(codebooks.NF4, (64, 1))]


@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_packed_bytes_are_the_bits_that_shapes_imply(spec):
  q = qarray.encode(W, spec)
  parts = len(jax.tree.leaves(q))  # Each may end in a part of a byte.
  assert q.nbits / 8 <= len(size.to_bytes(q)) < q.nbits / 8 + parts


def test_by_hand():
  """GGUF's blocks: Q4_0 is 18 bytes for 32 weights, Q4_K 144 and Q6_K 210 for 256."""
  for spec, block, per_block in ((specs.Q4_0, 32, 18), (specs.Q4_K, 256, 144), (specs.Q6_K, 256, 210)):
    assert len(size.to_bytes(qarray.encode(W, specs.kernel(spec)))) == W.size // block * per_block


def test_bytes_hold_the_codes():
  spec = specs.integer(3, (64, 1))
  q = qarray.encode(W, spec)
  stored = np.frombuffer(size.to_bytes(q), np.uint8)
  codes = packing.unpack(jnp.asarray(stored[:W.size * 3 // 8]), spec.format, W.size)
  np.testing.assert_array_equal(codes.reshape(W.shape), q.codes)
  np.testing.assert_array_equal(stored[W.size * 3 // 8:].view(np.float32).reshape(4, 6), q.scale)


@pytest.mark.parametrize('name', ['scanned', 'shared', 'tied', 'containers'])
@pytest.mark.parametrize('frozen', [False, True])
def test_a_model_agrees_with_explain(name, frozen, tmp_path):
  model = transform.quantize(zoo.MODELS[name](nnx.Rngs(0)), recipes.weight_only(4, (4, 1)))
  model = transform.freeze(model) if frozen else model
  about, got = explain.explain(model), size.measure(model)
  rows = {r.path: r for r in about.rows if r.weight != '-' and r.size_bytes}
  assert set(rows) == set(got.stored_bytes)
  for path, row in rows.items():
    assert got.stored_bytes[path] == row.size_bytes
  np.testing.assert_allclose(got.bits_per_weight, about.bits_per_weight, rtol=1e-12)
  assert got.bits_per_weight == 4 + 32 / 4
  file = tmp_path / 'weights'
  file.write_bytes(b''.join(size.to_bytes(q) for _, q in explain.quantized_weights(model).values()))
  assert file.stat().st_size == got.quantized_bytes


def test_a_mixed_model_counts_each_layer_by_its_own_bits():
  model = nnx.Sequential(*(nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(3)))
  rule = lambda i, bits: rules.Rule(f'layers/{i}', ste.STE(specs.integer(bits, (None, 1))))
  got = size.measure(transform.quantize(model, [rule(0, 2), rule(1, 8)]))  # The last stays in floats.
  assert got.stored_bytes == {'layers/0': 64 * 64 // 4 + 64 * 4, 'layers/1': 64 * 64 + 64 * 4}
  assert got.weights == 2 * 64 * 64


def test_a_float_model_has_nothing_to_pack():
  with pytest.raises(ValueError, match='no quantized weight'):
    size.measure(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
