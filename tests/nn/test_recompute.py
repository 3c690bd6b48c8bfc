"""No float copy of the base: temporaries of a compiled training step, and gradients that do not change for it."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qat
from qat.core import ranges, specs
from qat.nn import lora, recompute
from qat.quantizers.ste import STE

LAYERS, WIDTH = 12, 256
GRIDS = {'nf4, double quantization': STE(specs.kernel(specs.NF4_DQ), ranges.centered),
         'int4': STE(specs.integer(4, (32, 1))), 'mxfp4': STE(specs.kernel(specs.MXFP4), ranges.ocp_floor)}


class Tower(nnx.Module):

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])

  def __call__(self, x):
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return x


class Stack(nnx.Module):

  def __init__(self, rngs):
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def make(rngs):
      return nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.layers = make(rngs)

  def __call__(self, x):
    scan = nnx.scan(lambda layer, x: jnp.tanh(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return scan(self.layers, x)


def temporaries(model, rules, **options):
  """Bytes of a compiled step of Adam, beside its arguments and results."""
  model = lora.lora(model, rules, 4, 4.0, **options)
  graph, state = nnx.split((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=lora.LoRAParam)))

  def step(state, x):
    model, optimizer = nnx.merge(graph, state)
    loss = lambda model: jnp.sum(model(x) ** 2)
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, lora.LoRAParam))(model))
    return nnx.state((model, optimizer))

  return jax.jit(step).lower(state, jnp.ones((4, WIDTH))).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('grid', GRIDS)
def test_a_step_holds_the_floats_of_few_layers(grid):
  frozen = qat.freeze(qat.quantize(Tower(nnx.Rngs(0)), [qat.Rule('.*', weight=GRIDS[grid])]))
  assert temporaries(frozen, ['.*']) < 4 * WIDTH * WIDTH * LAYERS / 3


def test_so_it_does_where_layers_have_no_adapter():
  frozen = qat.freeze(qat.quantize(Tower(nnx.Rngs(0)), [qat.Rule('.*', weight=GRIDS['int4'])]))
  assert temporaries(frozen, ['layers/0']) < 4 * WIDTH * WIDTH * LAYERS / 3


def test_so_it_does_with_magnitudes():
  frozen = qat.freeze(qat.quantize(Tower(nnx.Rngs(0)), [qat.Rule('.*', weight=GRIDS['int4'])]))
  assert temporaries(frozen, ['.*'], dora=True) < 4 * WIDTH * WIDTH * LAYERS / 2


def test_so_it_does_in_a_scan():
  frozen = qat.freeze(qat.quantize(Stack(nnx.Rngs(0)), [qat.Rule('.*', weight=GRIDS['int4'])]))
  assert temporaries(frozen, ['.*']) < 4 * WIDTH * WIDTH * LAYERS / 2


@pytest.mark.parametrize('first', [1.0, np.nan, np.inf])
def test_numbers_that_are_not_finite_pass(first):
  """One row that is broken leaves the others as they are."""
  q = qat.encode(jax.random.normal(jax.random.key(0), (8, 4)), specs.integer(4, (8, 1)))
  x = jnp.ones((3, 8)).at[0, 0].set(first)
  f = lambda x, q: x @ qat.decode(q)
  y, pull = jax.jit(lambda x: jax.vjp(lambda x: recompute.product(f, x, q), x))(x)
  want, pull_want = jax.vjp(lambda x: f(x, q), x)
  np.testing.assert_allclose(y, want, rtol=1e-5)
  np.testing.assert_allclose(pull(x[:, :4])[0], pull_want(x[:, :4])[0], rtol=1e-5)
