"""Products of codes: int8 in the program that runs, exact sums, and the gradient of the decoded operands."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.models import decoder
from qat.nn import dot, recipes
from qat.quantizers.ste import STE

X = jax.random.normal(jax.random.key(0), (8, 64))


def lowered(model, x):
  graph, state = nnx.split(model)
  return jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)


def int8_dots(hlo):
  """How many dots of a compiled program multiply s8 by s8 into s32, in whatever fusion."""
  count = 0
  for a, b in re.findall(r' = s32\[[^\n]*? dot\((?:\S+ )?(%?[\w.]+), (?:\S+ )?(%?[\w.]+)\)', hlo):
    is_int8 = lambda name: re.search(rf'(?<![\w.]){re.escape(name)}(?: = |: )s8\[', hlo)
    count += bool(is_int8(a) and is_int8(b))
  return count


@pytest.mark.parametrize('name', ['w8a8', 'w4a8', 'w8a8_static'])
def test_frozen_and_trained_layers_run_an_int8_dot(name):
  model = qat.calibrate(qat.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), recipes.get(name)), [X])
  for m in (model, qat.freeze(model)):
    program = lowered(m, X)
    assert '(tensor<8x64xi8>, tensor<64x32xi8>) -> tensor<8x32xi32>' in program.as_text()
    assert int8_dots(program.compile().as_text()) == 1


@pytest.mark.parametrize('name', ['w8a8', 'w4a8', 'w8a8_static'])
def test_compute_in_floats_differs_by_rounding_of_sums_alone(name):
  make = lambda compute: qat.calibrate(
      qat.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), recipes.get(name), compute=compute), [X])
  low, wide = make('low_bit'), make('float')
  for m in (wide, qat.freeze(wide)):
    program = lowered(m, X).compile()
    assert int8_dots(program.as_text()) == 0
  run = nnx.jit(lambda m: m(X))
  np.testing.assert_array_equal(run(wide), run(qat.freeze(wide)))
  difference = np.abs(np.asarray(run(low), np.float64) - np.asarray(run(wide), np.float64))
  assert 0 < difference.max() < 64 * 2.0**-24 * np.abs(run(low)).max() * 8
  slope = nnx.jit(nnx.grad(lambda m: (m(X) ** 2).sum()))
  np.testing.assert_allclose(slope(wide).kernel[...], slope(low).kernel[...], rtol=1e-4, atol=1e-5)
  again = qat.quantize(wide, recipes.with_attention([qat.Rule('.*')], 8))  # Which has no operands here.
  assert vars(again)['quantizers'].compute == 'float'
  with pytest.raises(ValueError, match="compute 'int8': products are of"):
    make('int8')


def test_a_float_dot_is_no_int8_dot():
  model = qat.freeze(qat.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), recipes.get('w8a16')))
  program = lowered(model, X)
  assert not re.search(r'dot_general.*xi8>', program.as_text()) and int8_dots(program.compile().as_text()) == 0


def test_every_product_of_a_decoder_is_one_of_int8():
  """Seven in its one block, and the tied head; the two of attention are in floats."""
  model = decoder.llama(nnx.Rngs(0), vocab_size=16, context_length=8, width=32, layers=1, heads=2, ffn_width=64)
  program = lowered(qat.freeze(qat.quantize(model, recipes.get('w8a8'))), jnp.ones((1, 8), jnp.int32))
  assert int8_dots(program.compile().as_text()) == 8


def test_the_gradient_is_that_of_the_decoded_operands():
  model = qat.quantize(nnx.LinearGeneral((8, 8), (4, 2), axis=(-2, -1), rngs=nnx.Rngs(0)), recipes.get('w4a8'))
  x = X.reshape(8, 8, 8)
  q, w_hat = vars(model)['quantizers'], model.kernel[...].reshape(64, 8)
  x_hat = q.input(X)
  c = jax.random.normal(jax.random.key(1), (8, 4, 2))
  by_model, by_x = nnx.grad(lambda m, x: jnp.sum(c * m(x)), argnums=(0, 1))(model, x)
  flat = c.reshape(8, 8)
  np.testing.assert_allclose(by_model['kernel'][...].reshape(64, 8), x_hat.T @ flat, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(by_x.reshape(8, 64), flat @ w_hat.T, rtol=1e-4, atol=1e-5)


def test_a_product_of_ones_own_gets_the_input_on_its_grid():
  seen = []
  def own(x, w, dims, **settings):
    seen.append(x)
    return jax.lax.dot_general(x, w, dims, **settings)

  model = qat.quantize(nnx.Linear(64, 4, dot_general=own, rngs=nnx.Rngs(0)), recipes.get('w8a8'))
  model(X)
  np.testing.assert_array_equal(seen[0], vars(model)['quantizers'].input(X))


def test_the_dtype_of_the_sum_may_be_asked_for():
  make = lambda **s: nnx.Linear(64, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **s)
  for layer, dtype in ((make(), jnp.bfloat16), (make(preferred_element_type=jnp.float32), jnp.float32)):
    layer.bias = nnx.data(None)
    layer.use_bias = False
    assert qat.quantize(layer, recipes.get('w8a8'))(X).dtype == layer(X).dtype == dtype


@pytest.mark.parametrize('shape, contract, batch, merged', [
    ((2, 3, 4), (-1,), (), (2, 3, 4)), ((2, 3, 4), (0, 2), (), (3, 8)), ((2, 3, 4), (2, 0), (), (3, 8)),
    ((2, 3, 4), (2,), (1,), (3, 2, 4)), ((4,), (0,), (), (4,))])
def test_rows_and_back(shape, contract, batch, merged):
  x = jax.random.normal(jax.random.key(0), shape)
  assert dot.rows(x, contract, batch).shape == merged
  np.testing.assert_array_equal(dot.unrows(dot.rows(x, contract, batch), shape, contract, batch), x)


def test_groups_of_inputs_multiply_in_floats():
  rule = qat.Rule('.*', STE(specs.integer(4, (32, 1))), STE(specs.integer(8, specs.TOKEN)))
  model = qat.quantize(nnx.Linear(64, 4, rngs=nnx.Rngs(0)), (rule,))
  want = vars(model)['quantizers'].input(X) @ model.kernel[...]
  np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-5)


def test_fp8_is_multiplied_where_the_device_can(monkeypatch):
  """In training and in serving alike, with the numbers of decoded operands but for the order of rounding."""
  fp8 = lambda block: STE(qat.Spec(qat.formats.FP8_E4M3, block))
  floats = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
  model = qat.quantize(floats, [qat.Rule('.*', fp8(specs.CHANNEL), fp8(specs.TOKEN))])
  decoded = model(X)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  for m in (model, qat.freeze(model)):
    assert '(tensor<8x64xf8E4M3FN>, tensor<64x32xf8E4M3FN>) -> tensor<8x32xf32>' in lowered(m, X).as_text()
  np.testing.assert_array_equal(nnx.jit(lambda m: m(X))(model), nnx.jit(lambda m: m(X))(qat.freeze(model)))
  np.testing.assert_allclose(model(X), decoded, rtol=1e-5, atol=1e-5)
  loss = lambda m: jnp.sum(jnp.sin(m(X)))
  gradient = nnx.grad(loss)(model)['kernel'][...]
  monkeypatch.undo()
  np.testing.assert_allclose(gradient, nnx.grad(loss)(model)['kernel'][...], rtol=1e-4, atol=1e-5)
