"""Every named recipe trains, and serves what it trained, in float32 and bfloat16."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.nn import recipes

WIDTH = 128  # What every recipe's blocks tile.
NAMES = [name for name in recipes.RECIPES if name != 'float'] + ['w3a16_g64_asym', 'w4a8_asym', 'w8a8_static_tensor']
# Other bits and other blocks of what another name shows, and what bfloat16 is tried on: one of each kind.
VARIANTS = {'w4a4', 'w4a8_g32', 'w4a8_g128', 'w8a16', 'w3a16', 'w2a16', 'w4a16_g32', 'w4a16_g128', 'w3a16_g64',
            'w2a16_g64', 'w4a8_static', 'w4a4_static', 'w4a4_lsq', 'w3a3_lsq', 'w4a4_dorefa', 'w4a4_pact',
            'w8a8_attention', 'mxfp8', 'mxfp6', 'nf3', 'nf2', 'q8_0', 'w3a16_g64_asym'}
IN_BFLOAT16 = {'w8a8', 'w4a16_g64', 'w8a8_static', 'w2a2_lsq', 'w1a2g6_dorefa', 'w2a2_pact', 'w4a8_attention',
               'w4a8_stochastic', 'bitnet', 'fp8', 'mxfp4', 'nvfp4', 'nf4_dq', 'q4_1', 'w4a8_asym'}
SLOW = {('float32', name) for name in VARIANTS} | {('bfloat16', name) for name in set(NAMES) - IN_BFLOAT16}
CASES = [pytest.param(*case, marks=[pytest.mark.slow] if case in SLOW else [])
         for case in itertools.product(['float32', 'bfloat16'], NAMES)]


class Small(nnx.Module):
  """A layer of each kind that a recipe may tell apart. Each has an input near 1, for grids of few and fixed steps."""

  def __init__(self, rngs, dtype, attends=False):
    self.embed = nnx.Embed(32, WIDTH, dtype=dtype, rngs=rngs)
    self.conv = nnx.Conv(WIDTH, WIDTH, 1, dtype=dtype, rngs=rngs)
    self.up = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(WIDTH, WIDTH, use_bias=False, dtype=dtype, rngs=rngs)
    self.attention_fn = nnx.dot_product_attention if attends else lambda q, k, v: v

  def __call__(self, tokens):
    x = 16 * self.embed(tokens)
    q = self.up(x)[:, :, None]
    return self.head(x + self.conv(x) + self.attention_fn(q, q, q)[:, :, 0])


TOKENS = jnp.arange(8).reshape(2, 4) * 3


@nnx.jit
def outputs_and_gradients(model):
  loss = lambda m: (jnp.mean(jax.nn.logsumexp((y := m(TOKENS)).astype(jnp.float32), -1)), y)
  g, y = nnx.grad(loss, has_aux=True)(model)
  return y, g


run = nnx.jit(lambda model: model(TOKENS))


def make(name, dtype):
  model = Small(nnx.Rngs(0), dtype and jnp.dtype(dtype), attends='attention' in name)
  return qat.calibrate(qat.quantize(model, recipes.get(name)), [TOKENS])


@pytest.mark.parametrize('dtype, name', CASES)
def test_serves_what_it_trains(dtype, name):
  model = make(name, dtype)
  frozen = qat.freeze(model)
  y, g = outputs_and_gradients(model)
  assert y.dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(np.asarray(run(frozen), np.float32), np.asarray(y, np.float32))
  for path, p in nnx.to_flat_state(g):
    slope = np.asarray(p[...])
    assert np.isfinite(slope).all() and (slope.any() or 'kernel' not in path), path
  weights = {r.path: r.weight for r in qat.explain(frozen).rows if r.kind in ('Linear', 'Conv', 'Embed')}
  assert len(weights) == 4 and all(w.startswith('codes Spec(') for w in weights.values())


@pytest.mark.parametrize('name, bits', [('w8a8', 8), ('w4a8', 4), ('w2a2', 2), ('w4a16_g128', 4 + 32 / 128),
                                        ('mxfp4', 4.25), ('nvfp4', 4.5), ('q4_0', 4.5), ('nf4', 4.5)])
def test_bits_are_those_of_the_name(name, bits):
  rows = {r.path: r for r in qat.explain(make(name, None)).rows}
  scales = 32 / WIDTH if name in ('w8a8', 'w4a8', 'w2a2') else 32 / WIDTH**2 if name == 'nvfp4' else 0
  assert rows['up'].bits_per_weight == pytest.approx(bits + scales)


def test_float_leaves_everything_in_floats():
  model = qat.quantize(Small(nnx.Rngs(0), None), recipes.get('float'))
  assert type(model.up) is nnx.Linear and qat.explain(model).bits_per_weight == 32


def test_a_family_takes_bits():
  assert repr(recipes.family('lsq', 2, 2)) == repr(recipes.get('w2a2_lsq'))
  rules = recipes.resolve({'quantizer': 'ste', 'weight_bits': 3, 'input_bits': 5, 'rules': {'head': 'w8a8'}})
  rows = {r.path: r for r in qat.explain(qat.quantize(Small(nnx.Rngs(0), None), rules)).rows}
  assert 'INT3' in rows['up'].weight and 'INT8' in rows['head'].weight


@pytest.mark.parametrize('make, message', [
    (lambda: recipes.get('w4a9'), r"recipe 'w4a9': there is none of that name. Did you mean 'w4a8'\?"),
    (lambda: recipes.get('w4a8_kv4_kv8'), r"recipe 'w4a8_kv4_kv8': there is none of that name"),
    (lambda: recipes.get('qqqq_kv4'), r"recipe 'qqqq': there is none of that name. Known: w8a8, w4a8"),
    (lambda: recipes.family('lsqq', 2, 2), r"quantizer 'lsqq': there is none of that name. Did you mean 'lsq'\?"),
    (lambda: recipes.resolve({'name': 'w4a8', 'bits': 3}), r"\['bits'\] mean nothing to it"),
    (lambda: recipes.resolve({'name': 'w4a8', 'weight_bits': 3}), "'name' settles everything"),
    (lambda: recipes.resolve({'quantizer': 'lsq', 'weight_bits': 3}), "a family needs 'quantizer'")])
def test_wrong_recipes_say_what_is_known(make, message):
  with pytest.raises(ValueError, match=message):
    make()
