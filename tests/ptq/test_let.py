"""LET: the float outputs stay, and the quantized ones come closer to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.ptq import let, links
from qat.quantizers.ste import STE
from tests.ptq import tiny

RECIPE = [qat.Rule('.*', STE(specs.integer(4, specs.CHANNEL)), STE(specs.integer(4, specs.TOKEN)), kind='Linear'),
          qat.Rule('.*')]
X = jax.random.normal(jax.random.key(0), (2, 6, 24)) + 2.0 * (np.arange(24) % 5 == 0).astype(np.float32)[None, None]


def quantize(block):
  return qat.quantize(block, RECIPE)


@functools.cache
def learned():
  block = tiny.gpt().blocks[0]
  found = links.find(block, X)
  return (block, found, *let.learn(block, found, [X[:1], X[1:]], quantize, epochs=12))


def test_the_error_falls():
  block, found, other, errors = learned()
  assert len(errors) == 13 and min(errors) < 0.8 * errors[0]
  y = block(X)
  error = lambda b: float(np.mean((quantize(b)(X) - y) ** 2))
  np.testing.assert_allclose(error(block), errors[0], rtol=0.02)          # A code may round the other way.
  np.testing.assert_allclose(error(other), min(errors), rtol=0.02)


def test_the_float_block_stays():
  block, found, other, _ = learned()
  assert links.distance(block, other, X) < 1e-5
  for layer in ('attention_norm', 'ffn_norm'):
    a, b = getattr(block, layer), getattr(other, layer)
    assert (a.scale[...] != b.scale[...]).any() and (a.bias[...] != b.bias[...]).any()


def test_rms_norms_are_scaled_alone():
  block = tiny.llama().blocks[0]
  found = links.find(block, X)
  start = {link: jnp.full(24, 2.0) for link in found}
  other, errors = let.learn(block, found, [X], quantize, scales=start, epochs=1)
  assert len(errors) == 2 and other.attention.q.bias is None
  assert links.distance(block, other, X) < 1e-5


def test_it_never_ends_worse_than_it_began():
  block = tiny.llama().blocks[0]
  found = links.find(block, X)
  other, errors = let.learn(block, found, [X], quantize, epochs=1, lr=10.0)
  assert errors[1] > errors[0]
  assert links.distance(block, other, X) == 0


def test_nothing_to_learn():
  with pytest.raises(ValueError, match='0 batches and 0 links'):
    let.learn(tiny.llama(), (), [], quantize)
