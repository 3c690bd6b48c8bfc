"""Taps: what they gather is the x^T x of what each layer multiplies, whatever the layer."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import specs
from qat.nn import rules
from qat.ptq import running, taps
from qat.quantizers.ste import STE

RECIPE = [qat.Rule('.*', weight=STE(specs.integer(4, (None, 1))))]


class One(nnx.Module):
  """A single layer."""

  def __init__(self, layer):
    self.layer = layer

  def __call__(self, x):
    return self.layer(x)


def gathered(layer, x, recipe=RECIPE):
  model = qat.quantize(One(layer), recipe)
  paths = [site.path for site in rules.sites(model)]
  return running.gather(model, [x, x], paths, lambda model, x: model(x))


def check(moments, rows):
  """Against float64, for two batches of the same rows [*lead, n, k]."""
  rows = np.asarray(rows, np.float64)
  np.testing.assert_allclose(moments.H, np.swapaxes(rows, -1, -2) @ rows / rows.shape[-2], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(moments.mean_abs, np.abs(rows).mean(-2), rtol=1e-5)
  np.testing.assert_allclose(moments.largest, np.abs(rows).max(-2), rtol=1e-6)
  assert (np.asarray(moments.count) == 2 * rows.shape[-2]).all()


def draw(*shape):
  return jax.random.normal(jax.random.key(3), shape)


def test_linear():
  x = draw(2, 5, 4)
  check(gathered(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), x)['layer'], x.reshape(-1, 4))


def test_what_is_gathered_is_on_the_grid_of_the_input():
  x = draw(2, 5, 4)
  quantizer = STE(specs.integer(3, specs.TOKEN))
  recipe = [qat.Rule('.*', weight=RECIPE[0].weight, input=quantizer)]
  check(gathered(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), x, recipe)['layer'], quantizer(x).reshape(-1, 4))


def test_general_linear_over_two_axes():
  x = draw(2, 5, 3, 4)
  layer = nnx.LinearGeneral((3, 4), 6, axis=(-2, -1), rngs=nnx.Rngs(0))
  check(gathered(layer, x)['layer'], x.reshape(10, 12))


def test_einsum_of_a_batch_has_moments_of_each():
  x = draw(2, 5, 3, 4)
  layer = nnx.Einsum('bthd,hde->bthe', (3, 4, 6), rngs=nnx.Rngs(0))
  check(gathered(layer, x)['layer'], jnp.transpose(x, (2, 0, 1, 3)).reshape(3, 10, 4))


@pytest.mark.parametrize('groups, strides, padding', [(1, 1, 'SAME'), (2, 2, 'VALID'), (4, 1, 'SAME')])
def test_patches_of_a_convolution_multiply_as_it_does(groups, strides, padding):
  """w^T H w is the mean square of each output, if patches and the layer's matrix have one order."""
  x = draw(2, 6, 6, 4)
  layer = nnx.Conv(4, 8, (3, 3), strides, padding=padding, feature_group_count=groups, use_bias=False, rngs=nnx.Rngs(0))
  moments = gathered(layer, x)['layer']
  y = np.asarray(layer(x), np.float64).reshape(-1, groups, 8 // groups)
  site, = rules.sites(One(layer))
  w = np.asarray(site.layout.to_matrix(site.variable.get_value()), np.float64).reshape(-1, groups, 8 // groups)
  energy = np.einsum('kgo,gkl,lgo->go', w, np.asarray(moments.H, np.float64), w)
  np.testing.assert_allclose(energy, (y ** 2).mean(0), rtol=1e-4)
  assert (np.asarray(moments.count) == 2 * len(y)).all()


def test_layers_stacked_by_vmap_have_moments_of_each():
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(rngs):
    return nnx.Linear(4, 3, rngs=rngs)

  class Stacked(nnx.Module):
    def __init__(self):
      self.layers = make(nnx.Rngs(0).split(2))

    def __call__(self, x):
      return nnx.vmap(lambda layer, x: layer(x))(self.layers, x)

  x = draw(2, 5, 4)
  model = qat.quantize(Stacked(), RECIPE)
  check(running.gather(model, [x, x], ('layers',), lambda model, x: model(x))['layers'], x)


def test_a_tied_head_gathers_its_queries():
  class Tied(nnx.Module):
    def __init__(self):
      self.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
      return self.embed.attend(jnp.tanh(self.embed(tokens)))

  tokens = jnp.arange(6).reshape(2, 3)
  model = qat.quantize(Tied(), RECIPE)
  found = running.gather(model, [tokens, tokens], ('embed',), lambda model, x: model(x))['embed']
  check(found, jnp.tanh(model.embed(tokens)).reshape(-1, 4))


def test_what_cannot_be_gathered_says_why():
  model = qat.quantize(One(nnx.ConvTranspose(2, 2, (3,), rngs=nnx.Rngs(0))), RECIPE)
  site, = rules.sites(model)
  assert 'transposed' in taps.tappable(site)
  assert not running.gather(model, [draw(1, 5, 2)], ('layer',), lambda model, x: model(x))


def test_pairs_are_of_the_quantized_and_the_float_layer():
  layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
  inputs = [jax.random.normal(jax.random.key(i), (3, 5, 6)) for i in range(4)]
  model = qat.quantize(One(layer), RECIPE)
  apply = lambda model, x: model(x)
  found = running.gather_pairs(model, One(layer), inputs[:2], inputs[2:], ('layer',), apply)['layer']
  x_hat, x = (np.concatenate([np.asarray(a, np.float64).reshape(-1, 6) for a in part])
              for part in (inputs[:2], inputs[2:]))
  np.testing.assert_allclose(found.G, x_hat.T @ x / 30, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found.H, x_hat.T @ x_hat / 30, rtol=1e-5, atol=1e-5)
