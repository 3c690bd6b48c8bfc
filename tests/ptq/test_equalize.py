"""Cross-layer equalization: both sides of a link get equal ranges, and the outputs stay."""

from flax import nnx
import jax.numpy as jnp
import numpy as np

import qat
from qat.core import specs
from qat.models import mlp
from qat.ptq import channels, equalize, links
from qat.quantizers.ste import STE
from tests.ptq import tiny


def conv_links(model):
  """Through relus, to a head that reads every place of the last convolution."""
  return links.resolve(model, [
      links.Link('blocks/0/conv', ('blocks/1/depthwise',)), links.Link('blocks/1/depthwise', ('blocks/1/pointwise',)),
      links.Link('blocks/1/pointwise', ('head',))], tiny.IMAGES)


def test_factors_make_ranges_equal():
  r1, r2 = np.array([8.0, 1.0, 0.0], np.float32), np.array([2.0, 4.0, 1.0], np.float32)
  s = np.asarray(equalize.factors(r1, r2))
  np.testing.assert_allclose(s, [2.0, 0.5, 1.0])
  np.testing.assert_allclose((r1 / s)[:2], (r2 * s)[:2])


def test_a_depthwise_network():
  model = tiny.convs()
  found = conv_links(model)
  other = equalize.equalize(model, found)
  assert links.distance(model, other, tiny.IMAGES) < 1e-5
  for link in found:
    r1 = jnp.abs(channels.outputs(channels.find(other, link.source), '')).max(-2)
    r2 = jnp.abs(channels.inputs(channels.find(other, link.targets[0]), '')).max(-1)
    r2 = links.gather(r2, len(r1))
    np.testing.assert_allclose(r1, r2, rtol=0.01)
  assert (other.blocks[0].conv.kernel[...] != model.blocks[0].conv.kernel[...]).any()


def test_one_scale_a_tensor_serves_better():
  """Of weights whose channels a function-preserving rescale has spread by 2^-4 to 2^4."""
  model = mlp.MLP((6, 16, 16, 4), nnx.Rngs(0))
  x = nnx.Rngs(1).normal((32, 6))
  found = links.resolve(model, [links.Link(f'layers/{i}', (f'layers/{i + 1}',)) for i in (0, 1)], x)
  spread = {link: 2.0 ** np.random.default_rng(i).integers(-4, 5, 16) for i, link in enumerate(found)}
  bad = links.rescale(model, spread)
  run = nnx.jit(lambda m, x: m(x))
  recipe = [qat.Rule('.*', STE(specs.integer(8, specs.TENSOR)))]
  wrong = lambda m: float(jnp.mean((run(qat.quantize(m, recipe), x) - run(model, x)) ** 2))
  assert wrong(equalize.equalize(bad, found)) < 0.05 * wrong(bad)


def test_dead_channels_and_no_links():
  model = mlp.MLP((4, 6, 3), nnx.Rngs(0))
  model.layers[0].kernel[...] = model.layers[0].kernel[...].at[:, 2].set(0.0)
  x = nnx.Rngs(1).normal((5, 4))
  found = links.resolve(model, links.Link('layers/0', ('layers/1',)), x)
  other = equalize.equalize(model, found)
  assert links.distance(model, other, x) < 1e-6
  np.testing.assert_array_equal(other.layers[1].kernel[...][2], model.layers[1].kernel[...][2])
  assert links.distance(model, equalize.equalize(model, ()), x) == 0
