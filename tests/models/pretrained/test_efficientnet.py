"""EfficientNet-Lite0 as it was published, and files that are not it."""

import dataclasses

from flax import nnx
import numpy as np
import pytest

import qat
from qat.models import efficientnet as networks
from qat.models.pretrained import efficientnet
from qat.run import photos, published
from tests import offline
from tests.models.pretrained import torch_files

TINY = networks.Config((networks.Stage(1, 3, 1, 1, 4), networks.Stage(2, 5, 2, 3, 6)), image_size=17, stem_width=8,
                       head_width=12, classes=5)
forward = nnx.jit(lambda model, x: model(x))


def tensors(model):
  """A state dict of the EfficientNet-PyTorch package from a model of ours."""
  pure = {'/'.join(map(str, path)): np.asarray(p) for path, p in nnx.to_flat_state(nnx.state(model))}
  out = {}

  def layer(conv, norm, ours):
    out[f'{conv}.weight'] = np.ascontiguousarray(np.moveaxis(pure[f'{ours}/conv/kernel'], (3, 2), (0, 1)))
    for theirs, field in dict(weight='scale', bias='bias', running_mean='mean', running_var='var').items():
      out[f'{norm}.{theirs}'] = pure[f'{ours}/norm/{field}']
    out[f'{norm}.num_batches_tracked'] = np.array(3, np.int64)

  layer('_conv_stem', '_bn0', 'stem')
  for i, block in enumerate(model.blocks):
    if block.expand is not None:
      layer(f'_blocks.{i}._expand_conv', f'_blocks.{i}._bn0', f'blocks/{i}/expand')
    layer(f'_blocks.{i}._depthwise_conv', f'_blocks.{i}._bn1', f'blocks/{i}/depthwise')
    layer(f'_blocks.{i}._project_conv', f'_blocks.{i}._bn2', f'blocks/{i}/project')
  layer('_conv_head', '_bn1', 'top')
  out['_fc.weight'], out['_fc.bias'] = np.ascontiguousarray(pure['head/kernel'].T), pure['head/bias']
  return out


@pytest.fixture(scope='module')
def tiny():
  """A network, and its state dict."""
  model = networks.EfficientNet(TINY, nnx.Rngs(0))
  state = nnx.state(model)
  random = np.random.default_rng(0)
  nnx.update(model, nnx.map_state(lambda _, p: random.uniform(0.5, 1.5, p.shape).astype(np.float32), state))
  model.eval()
  return model, tensors(model)


@pytest.fixture
def read(monkeypatch):
  """Reads a state dict from a file in torch's layout; the tiny network is among the forms known."""
  monkeypatch.setattr(efficientnet, 'FORMS', (dataclasses.replace(TINY, classes=1000), networks.LITE0))
  return lambda arrays: efficientnet.TorchFile(torch_files.legacy(*torch_files.tensors(arrays, old=True)))


def test_every_tensor_finds_its_place(tiny, read):
  model, arrays = tiny
  file = read(arrays)
  assert file.config == TINY
  images = np.random.default_rng(1).normal(size=(2, 17, 17, 3)).astype(np.float32)
  np.testing.assert_array_equal(forward(file.model(), images), forward(model, images))
  assert file.tokenizer() is None
  assert file.facts()['base'] == 'float32' and file.facts()['parameters'] == sum(
      a.size for a in arrays.values() if a.dtype == np.float32)


def test_state_dicts_that_do_not_fit_are_refused(tiny, read):
  arrays = tiny[1]
  without = lambda *names: {k: v for k, v in arrays.items() if k not in names}
  name = '_blocks.1._depthwise_conv.weight'
  with pytest.raises(ValueError, match=rf"1 of \d+ variables have no tensor, the first 'blocks/1/depthwise/conv/kernel'"
                                       rf", which should be '{name}'"):
    read(without(name)).model()
  with pytest.raises(ValueError, match=rf"tensor '{name}' has shape \(12, 1, 3, 3\).*has shape \(5, 5, 1, 12\)"):
    read(arrays | {name: np.zeros((12, 1, 3, 3), np.float32)}).model()
  with pytest.raises(ValueError, match=rf"tensor '{name}' of shape \(12,\).*convolution of images 4"):
    read(arrays | {name: np.zeros(12, np.float32)}).model()
  with pytest.raises(ValueError, match=r"1 tensors have no place in the model, the first \['_blocks.1._se_reduce.bias"):
    read(arrays | {'_blocks.1._se_reduce.bias': np.zeros(4, np.float32)}).model()
  with pytest.raises(ValueError, match=r'has 2 blocks and _conv_head.weight has shape \(12, 6, 1, 1\); the Lite forms'):
    read({k: v for k, v in arrays.items() if not k.startswith('_blocks.2')})
  with pytest.raises(ValueError, match=r"has 0 blocks .* shape \(\).*begin \['layer1.weight'\]. Give the state dict"):
    read({'layer1.weight': np.zeros(3, np.float32)})


def test_a_checkpoint_is_no_state_dict():
  pushed = b'}' + torch_files.text('epoch') + torch_files.integer(3) + b's'
  with pytest.raises(ValueError, match=r'it holds a dict, and a state dict is a dict of tensors alone'):
    efficientnet.TorchFile(torch_files.zipped(pushed, {}))


# The published network.

@pytest.fixture(scope='module')
def lite0():
  with offline.skips():
    return published.load('efficientnet_lite0').model


@pytest.fixture(scope='module')
def labelled():
  with offline.skips():
    return photos.imagenet()


def test_the_published_network_knows_18_of_20_photos(lite0, labelled):
  images, labels = labelled
  logits = np.asarray(forward(lite0, images))
  before = (logits > logits[np.arange(20), labels][:, None]).sum(axis=1)
  assert ((before < 1).sum(), (before < 5).sum()) == (18, 19)


@pytest.mark.slow
def test_the_published_network_folds(lite0, labelled):
  images = labelled[0]
  folded = qat.fold_batch_norm(lite0, images[:2])
  before, after = forward(lite0, images), forward(folded, images)
  np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
