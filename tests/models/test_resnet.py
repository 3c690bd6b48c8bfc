"""Residual networks: the sizes of the published ones, and a block by hand."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from qat.models import resnet


# As torchvision's networks of these names have; of CIFAR, the paper's 0.27, 0.46 and 0.85 million (Table 6).
@pytest.mark.parametrize('make, parameters', [
    (resnet.resnet18, 11_689_512), (resnet.resnet34, 21_797_672), (resnet.resnet50, 25_557_032),
    (resnet.resnet101, 44_549_160)])
def test_parameters_are_those_of_the_published_networks(make, parameters):
  params = nnx.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Param))
  assert sum(p.size for p in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize('layers, millions', [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_parameters_of_cifars_are_those_of_the_paper(layers, millions):
  params = nnx.eval_shape(lambda: nnx.state(resnet.cifar(nnx.Rngs(0), layers=layers), nnx.Param))
  assert sum(p.size for p in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, abs=0.0105)


def test_an_image_of_224_ends_in_7_by_7():
  seen = []

  def run():
    model = resnet.resnet50(nnx.Rngs(0))
    x = nnx.relu(model.norm(model.stem(jnp.zeros((1, 224, 224, 3)))))
    x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    seen.append(x.shape)
    for block in model.blocks:
      x = block(x)
    return x

  assert nnx.eval_shape(run).shape == (1, 7, 7, 2048) and seen == [(1, 56, 56, 64)]


def test_a_block_is_that_of_the_paper_in_float64():
  """Two convolutions with symmetric padding and the projected input, against scipy."""
  block = nnx.jit(lambda: resnet.cifar(nnx.Rngs(0), layers=8, width=4).blocks[1])()  # 4 to 8 channels, halving.
  block.eval()
  x = np.random.default_rng(0).normal(size=(1, 6, 6, 4)).astype(np.float32)
  y = nnx.jit(lambda block, x: block(x))(block, x)

  def conv(x, layer, stride, pad):
    w = np.asarray(layer.kernel[...], np.float64)
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    return np.stack([sum(signal.correlate(x[..., i], w[..., i, o], 'valid') for i in range(x.shape[-1]))
                     for o in range(w.shape[-1])], -1)[::stride, ::stride]

  norm = 1 / np.sqrt(1 + 1e-5)  # Running averages are 0 and 1, as they begin.
  h = np.maximum(conv(x[0].astype(np.float64), block.conv1, 2, 1) * norm, 0)
  added = conv(x[0].astype(np.float64), block.shortcut.conv, 2, 0) * norm
  want = np.maximum(conv(h, block.conv2, 1, 1) * norm + added, 0)
  np.testing.assert_allclose(y[0], want, rtol=1e-4, atol=1e-5)


def test_wrong_images_and_depths():
  with pytest.raises(ValueError, match=r'shape \(2, 8, 8, 1\): it takes images'):
    nnx.eval_shape(lambda: resnet.cifar(nnx.Rngs(0), layers=8)(jnp.zeros((2, 8, 8, 1))))
  with pytest.raises(ValueError, match='21 layers: there are 6 n'):
    resnet.cifar(nnx.Rngs(0), layers=21)
