"""SmoothQuant: Eq. 4, on the model's own norms, and where there is none."""

import functools

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.ptq import links, smooth
from qat.quantizers import static
from qat.quantizers.ste import STE
from tests.ptq import tiny


@functools.cache
def smoothed(alpha=0.5):
  model = tiny.llama()
  found = links.find(model, tiny.TOKENS)
  seen = smooth.largest(model, [t for link in found for t in link.targets], [tiny.TOKENS])
  return model, found, seen, smooth.smooth(model, seen, found, alpha)


def test_factors_are_those_of_equation_4():
  x, w = np.array([8.0, 0.5, 0.0, 1.0], np.float32), np.array([2.0, 0.5, 1.0, 0.0], np.float32)
  np.testing.assert_allclose(smooth.factors(x, w, 0.5), [2.0, 1.0, 1.0, 1.0], rtol=1e-6)  # Dead channels keep 1.
  np.testing.assert_allclose(smooth.factors(x, w, 0.75)[:1], [8 ** 0.75 / 2 ** 0.25], rtol=1e-6)
  np.testing.assert_allclose(smooth.factors(np.float32([1e-8]), np.float32([1e6])), [1e-5])


def test_largest_sees_what_layers_read():
  model, found, seen, _ = smoothed()
  block = model.blocks[0]
  x = block.attention_norm(model.embed(tiny.TOKENS))
  np.testing.assert_allclose(seen['blocks/0/attention/q'], jnp.abs(x).max((0, 1)), rtol=1e-5)
  assert seen['blocks/1/ffn/gate'].shape == (24,)


def test_half_the_difficulty_moves():
  """With alpha 0.5, max|X_j| and max|W_j| are equal afterwards: both sqrt(max|X_j| max|W_j|)."""
  model, found, seen, other = smoothed()
  after = smooth.largest(other, list(seen), [tiny.TOKENS])
  attention = other.blocks[1].attention
  w = np.max([np.abs(layer.kernel[...]).max(1) for layer in (attention.q, attention.k, attention.v)], 0)
  np.testing.assert_allclose(after['blocks/1/attention/q'], w, rtol=1e-4)
  spread = lambda x: float(jnp.max(x) / jnp.median(x))
  assert spread(after['blocks/1/attention/q']) < spread(seen['blocks/1/attention/q']) / 1.5


def test_one_scale_a_tensor_serves_better():
  model, _, _, other = smoothed()
  spec = specs.integer(6, specs.TENSOR)
  recipe = [qat.Rule('blocks/.*/(q|k|v|gate|up)', STE(specs.integer(6, specs.CHANNEL)), static.Static(spec)),
            qat.Rule('.*')]
  run = nnx.jit(lambda m, x: m(x))
  wrong = lambda m: jnp.mean((run(qat.calibrate(qat.quantize(m, recipe), [tiny.TOKENS]), tiny.TOKENS)
                              - run(model, tiny.TOKENS)) ** 2)
  assert wrong(other) < 0.7 * wrong(model)


def test_inputs_are_divided_at_the_door():
  """The outputs of an encoder's norms are added to the stream as well: nothing before its layers can be scaled."""
  model = tiny.bert()
  layers = [f'blocks/{i}/{name}' for i in (0, 1) for name in ('attention/q', 'attention/v', 'ffn/down')]
  seen = smooth.largest(model, layers, [tiny.TOKENS])
  other = smooth.smooth_inputs(model, seen, layers)
  assert links.distance(model, other, tiny.TOKENS) < 1e-5
  assert isinstance(other.blocks[0].ffn.down, nnx.Linear) and type(model.blocks[0].ffn.down) is nnx.Linear
  after = smooth.largest(other, layers, [tiny.TOKENS])                    # What the product reads, and quantizers see.
  down = 'blocks/1/ffn/down'
  np.testing.assert_allclose(after[down], np.abs(other.blocks[1].ffn.down.kernel[...]).max(1), rtol=1e-4)
  recipe = [qat.Rule('blocks/.*', STE(specs.integer(8, specs.CHANNEL)), static.Static(specs.integer(8, specs.TENSOR)),
                     kind='.*Linear'), qat.Rule('.*')]
  quantized = qat.calibrate(qat.quantize(other, recipe), [tiny.TOKENS])
  assert links.distance(quantized, qat.freeze(quantized), tiny.TOKENS) < 1e-6  # Norms differ in a last bit.
  assert links.distance(model, quantized, tiny.TOKENS) < 0.1
  with pytest.raises(ValueError, match="'blocks/1/ffn/down' has an input that is changed already, by Divide"):
    smooth.smooth_inputs(other, after, [down])
  with pytest.raises(ValueError, match="'embed', a Embed, does not read"):
    smooth.smooth_inputs(model, {'embed': jnp.ones(24)}, ['embed'])


def test_errors():
  model, found, seen, _ = smoothed()
  with pytest.raises(ValueError, match=r"No max \|x\| is given for 'blocks/0/attention/q'"):
    smooth.smooth(model, {}, found)
  with pytest.raises(ValueError, match='alpha 1.5'):
    smooth.smooth(model, seen, found, 1.5)
  with pytest.raises(ValueError, match=r"0 to \['blocks/0/ffn/up'\]"):
    smooth.largest(model, ['blocks/0/ffn/up'], [])
  with pytest.raises(ValueError, match="There is no module 'x'"):
    smooth.largest(model, ['x'], [tiny.TOKENS])
