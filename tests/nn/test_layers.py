"""Every layer with a weight: what it reads, what it computes, what it learns, in float32 and bfloat16.

All layers run in one compiled program, and their frozen copies in another.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.quantizers.ste import STE

RECIPE = (qat.Rule('.*', weight=STE(specs.integer(4, specs.CHANNEL)), input=STE(specs.integer(8, specs.TOKEN))),)


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer, and where its weight and its input have the axes that are summed over.

  Attributes:
    make: (rngs, dtype) -> layer.
    shape: of the input.
    inputs: the weight's axes that share a scale.
    contract: the input's axes that share a scale; None for an input that is looked up.
    name: of the weight.
  """
  make: functools.partial
  shape: tuple
  inputs: tuple
  contract: tuple | None = (-1,)
  name: str = 'kernel'


def einsum(equation, shape, bias_shape=None):
  return functools.partial(nnx.Einsum, equation, shape, bias_shape)


part = functools.partial
CASES = {
    'linear': Case(part(nnx.Linear, 8, 6), (4, 8), (0,)),
    'linear of one example': Case(part(nnx.Linear, 8, 6), (8,), (0,)),
    'linear of no example': Case(part(nnx.Linear, 8, 6), (0, 8), (0,)),
    'linear of a sequence': Case(part(nnx.Linear, 8, 6, use_bias=False), (2, 3, 8), (0,)),
    'linear general': Case(part(nnx.LinearGeneral, (2, 3), (4, 5), axis=(1, -1)), (7, 2, 3), (0, 1), (1, 2)),
    'linear general, axes apart': Case(part(nnx.LinearGeneral, (2, 3), 5, axis=(1, 3)), (7, 2, 4, 3), (0, 1), (1, 3)),
    'linear general of a batch axis': Case(
        part(nnx.LinearGeneral, 8, 6, batch_axis={0: 4}), (4, 5, 8), (1,)),
    'einsum': Case(einsum('btd,dhk->bthk', (8, 2, 3), (2, 3)), (2, 3, 8), (0,)),
    'einsum with outputs first': Case(einsum('btd,hdk->bthk', (2, 8, 3)), (2, 3, 8), (1,)),
    'einsum with a permuted result': Case(einsum('btd,dhk->khbt', (8, 2, 3)), (2, 3, 8), (0,)),
    'einsum over two letters': Case(einsum('bthk,khd->btd', (3, 2, 8)), (2, 3, 2, 3), (0, 1), (2, 3)),
    'einsum with a batch letter': Case(einsum('teb,ebd->ted', (3, 8, 4)), (2, 3, 8), (1,)),
    'einsum with an ellipsis': Case(einsum('...d,dh->...h', (8, 6)), (2, 3, 8), (0,)),
    'einsum in capitals': Case(einsum('...A,AB->...B', (8, 6)), (2, 3, 8), (0,)),
    'einsum that sums rows': Case(einsum('btd,dh->bh', (8, 6)), (2, 3, 8), (0,)),
    'conv': Case(part(nnx.Conv, 3, 8, (3, 3)), (2, 5, 5, 3), (0, 1, 2)),
    'conv of one image': Case(part(nnx.Conv, 3, 8, (3, 3), use_bias=False), (5, 5, 3), (0, 1, 2)),
    'conv in one dimension': Case(part(nnx.Conv, 4, 6, 3, padding='CAUSAL', strides=2), (2, 8, 4), (0, 1)),
    'grouped conv': Case(part(nnx.Conv, 4, 8, (3, 3), feature_group_count=2), (2, 5, 5, 4), (0, 1, 2)),
    'depthwise conv': Case(part(nnx.Conv, 4, 4, (3, 3), feature_group_count=4), (2, 5, 5, 4), (0, 1, 2)),
    'conv transpose': Case(part(nnx.ConvTranspose, 3, 8, (3, 3), strides=2), (2, 4, 4, 3), (0, 1, 2)),
    'conv transpose, transposed': Case(
        part(nnx.ConvTranspose, 3, 8, (3, 3), transpose_kernel=True), (2, 4, 4, 3), (0, 1, 3)),
    'embed': Case(part(nnx.Embed, 10, 8), (2, 3), (1,), None, 'embedding'),
}
EMPTY = 'linear of no example'
# One of each class: what is differentiated in bfloat16.
CLASSES = 'linear', 'linear general', 'einsum', 'conv', 'conv transpose', 'embed'


def grid(x, axes, most):
  """Symmetric integers, recomputed: max|x| over `axes` stands at `most`."""
  x = np.asarray(x, np.float32)
  if x.size == 0:
    return x
  scale = np.abs(x).max(axes, keepdims=True) / np.float32(most)
  u = x * (np.float32(1) / scale)
  return (np.clip(np.round(u), -most - 1, most) * scale).astype(np.float32)


def example(case, dtype):
  if case.contract is None:
    return jnp.arange(np.prod(case.shape)).reshape(case.shape) % 10
  return jax.random.normal(jax.random.key(1), case.shape, dtype)


@nnx.jit
def forward(layers, xs):
  return {name: layer(xs[name]) for name, layer in layers.items()}


@nnx.jit
def learn(layers, xs):
  loss = lambda layers: sum(jnp.sum(jnp.sin(layers[n](xs[n]).astype(jnp.float32))) for n in layers)
  return forward(layers, {n: xs[n] for n in layers}), nnx.grad(loss)(layers)


@functools.cache
def results(dtype):
  """For all cases: float layers, quantized layers, inputs, outputs, and those of the frozen layers."""
  dtype = jnp.dtype(dtype)
  floats, model, xs = quantized(dtype)
  ys = learned('float32', tuple(CASES))[0] if dtype == jnp.float32 else forward(model, xs)
  frozen = qat.freeze(model)
  return floats, model, xs, ys, frozen, forward(frozen, xs)


@functools.cache
def quantized(dtype):
  """Float layers, quantized layers, and inputs."""
  rngs = nnx.Rngs(0)
  floats = nnx.Dict({name: case.make(dtype=dtype, rngs=rngs) for name, case in CASES.items()})
  return floats, qat.quantize(floats, RECIPE), {name: example(case, dtype) for name, case in CASES.items()}


@functools.cache
def learned(dtype, names):
  """(outputs, gradients) of the layers of these names, in one program."""
  _, model, xs = quantized(jnp.dtype(dtype))
  return learn(nnx.Dict({name: model[name] for name in names}), xs)


dtypes = pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
cases = pytest.mark.parametrize('name', CASES)


@cases
def test_the_weight_that_is_read_is_on_the_grid_of_its_inputs(name):
  floats, model, *_, frozen, _ = results('float32')
  case = CASES[name]
  want = grid(getattr(floats[name], case.name)[...], case.inputs, 7)
  for layer in (model[name], frozen[name]):
    seen = np.asarray(getattr(layer, case.name)[...])
    np.testing.assert_allclose(seen, want, rtol=3e-7, atol=0)
    assert len(np.unique(seen)) < seen.size


@cases
@dtypes
def test_the_layer_computes_what_its_float_layer_does_on_the_grid(name, dtype):
  floats, model, xs, ys, *_ = results(dtype)
  case, x = CASES[name], xs[name]
  layer = nnx.clone(floats[name])
  getattr(layer, case.name)[...] = getattr(model[name], case.name)[...]
  x_hat = x if case.contract is None else jnp.asarray(grid(x, case.contract, 127)).astype(dtype)
  tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == 'float32' else dict(rtol=2e-2, atol=4e-2)
  want = layer(x_hat)
  assert ys[name].dtype == want.dtype == jnp.dtype(dtype) and ys[name].shape == want.shape
  np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (ys[name], want)), **tolerance)


@cases
@dtypes
def test_frozen_is_trained_bit_for_bit(name, dtype):
  *_, ys, frozen, served = results(dtype)
  np.testing.assert_array_equal(np.asarray(served[name]), np.asarray(ys[name]))
  assert not jax.tree.leaves(nnx.state(frozen[name], nnx.Param).get(CASES[name].name, {}))


@pytest.mark.parametrize('dtype, name', [('float32', n) for n in CASES] + [
    pytest.param('bfloat16', n, marks=[] if n in CLASSES else [pytest.mark.slow]) for n in CASES])
def test_gradients_reach_the_floats(dtype, name):
  names = tuple(n for n in CASES if dtype == 'float32' or (n in CLASSES) == (name in CLASSES))
  g = np.asarray(learned(dtype, names)[1][name][CASES[name].name][...])
  assert g.dtype == np.float32 and np.isfinite(g).all()
  assert g.any() or name == EMPTY


@cases
def test_explain_lists_it(name):
  floats, model, *_, frozen, _ = results('float32')
  for m, weight in ((floats, '-'), (model, 'STE Spec(INT4, (None, 1))'), (frozen, 'codes Spec(INT4, (None, 1))')):
    row, = (r for r in qat.explain(m).rows if r.path == name)
    assert row.weight == weight and row.kind == type(floats[name]).__name__
    assert np.prod(row.shape) == getattr(floats[name], CASES[name].name)[...].size


@pytest.mark.parametrize('name', ['linear', 'conv', 'conv transpose', 'einsum'])
def test_the_input_may_be_a_keyword(name):
  _, model, xs, ys, *_ = results('float32')
  np.testing.assert_allclose(model[name](inputs=xs[name]), ys[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['linear', 'conv'])
def test_whole_numbers_are_an_input(name):
  _, model, xs, *_ = results('float32')
  pixels = (10 * xs[name]).astype(jnp.int32)
  np.testing.assert_array_equal(model[name](pixels), model[name](pixels.astype(jnp.float32)))


def test_an_equation_given_to_the_call_may_sum_other_axes():
  layer = nnx.Einsum('bd,dh->bh', (8, 6), rngs=nnx.Rngs(0))
  model = qat.quantize(layer, RECIPE)
  x = jax.random.normal(jax.random.key(0), (3, 6))
  want = grid(x, -1, 127) @ grid(layer.kernel[...], 0, 7).T
  np.testing.assert_allclose(model(x, 'bh,dh->bd'), want, rtol=1e-5, atol=1e-5)
