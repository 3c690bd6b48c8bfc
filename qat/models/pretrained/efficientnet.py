"""EfficientNet-Lite from the weights of a torch file, under the names of the EfficientNet-PyTorch package.

https://github.com/lukemelas/EfficientNet-PyTorch (without `Lite`), whose names the published Lite weights keep.
"""

import dataclasses
import re

from flax import nnx
import numpy as np

from qat.models import efficientnet
from qat.models.pretrained import fill
from qat.models.pretrained import names
from qat.models.pretrained import torch_pickle


def conv(x):
  """[out, in, h, w] -> [h, w, in, out]; a depthwise kernel has in = 1 in both."""
  if x.ndim != 4:
    raise ValueError(f'it has {x.ndim} axes, and a convolution of images 4')
  return x.transpose(2, 3, 1, 0)


def _layer(theirs, norm, ours):
  """The rows of a convolution and its norm."""
  prefix = theirs.rpartition('.')[0]
  norm = f'{prefix}.{norm}' if prefix else norm
  return [names.Name(f'{theirs}.weight', f'{ours}/conv/kernel', conv),
          names.Name(f'{norm}.weight', f'{ours}/norm/scale'),
          names.Name(f'{norm}.bias', f'{ours}/norm/bias'),
          names.Name(f'{norm}.running_mean', f'{ours}/norm/mean'),
          names.Name(f'{norm}.running_var', f'{ours}/norm/var')]


NAMES = [
    *_layer('_conv_stem', '_bn0', 'stem'),
    *_layer('_blocks.{i}._expand_conv', '_bn0', 'blocks/{i}/expand'),
    *_layer('_blocks.{i}._depthwise_conv', '_bn1', 'blocks/{i}/depthwise'),
    *_layer('_blocks.{i}._project_conv', '_bn2', 'blocks/{i}/project'),
    *_layer('_conv_head', '_bn1', 'top'),
    names.Name('_fc.weight', 'head/kernel', names.transposed),
    names.Name('_fc.bias', 'head/bias'),
]
IGNORED = (r'.*\.num_batches_tracked',)
FORMS = (efficientnet.LITE0, efficientnet.LITE1, efficientnet.LITE2, efficientnet.LITE3, efficientnet.LITE4)


class TorchFile:
  """A file of torch.save that holds the state dict of an EfficientNet-Lite.

  Attributes:
    tensors: name -> array.
    config: the sizes of the network, found by its blocks and the width of the last.
  """

  def __init__(self, path):
    """Args: path: of the file, or its bytes."""
    self.where = f'{len(path)} bytes' if isinstance(path, bytes) else str(path)
    self.tensors = torch_pickle.read(path)
    if not isinstance(self.tensors, dict) or not all(isinstance(t, np.ndarray) for t in self.tensors.values()):
      raise ValueError(f'{self.where}: it holds a {type(self.tensors).__name__}, and a state dict is a dict of tensors '
                       'alone. Save `model.state_dict()`.')
    self.config = config(self.tensors, self.where)

  def model(self, dtype=None):
    """The network in evaluation mode, with float32 weights, computing in `dtype`; float32 if not given."""
    make_model = lambda: efficientnet.EfficientNet(self.config, nnx.Rngs(0), dtype)
    model = fill.fill(make_model, self.tensors, NAMES, self.where, IGNORED)
    model.eval()
    return model

  def tokenizer(self):
    """None: images have no tokens."""

  def facts(self):
    """What to print beside numbers that were measured on it."""
    weights = [t for name, t in self.tensors.items() if not any(re.fullmatch(p, name) for p in IGNORED)]
    most = max(weights, key=np.size).dtype.name
    return dict(name=self.where.rpartition('/')[2], base=most, parameters=sum(map(np.size, weights)),
                tensors=f'{len(weights)} {most}', image_size=self.config.image_size)


def config(tensors, where):
  """The one of FORMS that the names and shapes of a state dict are of, with its number of classes."""
  blocks = {name.split('.')[1] for name in tensors if name.startswith('_blocks.')}
  shape = lambda name: np.shape(tensors.get(name, 0))
  for form in FORMS:
    if (form.layers, form.stages[-1].width) == (len(blocks), *shape('_conv_head.weight')[1:2]):
      return dataclasses.replace(form, classes=(*shape('_fc.bias'), form.classes)[0])
  sizes = [(form.layers, form.stages[-1].width) for form in FORMS]
  raise ValueError(f'{where}: it has {len(blocks)} blocks and _conv_head.weight has shape '
                   f'{shape("_conv_head.weight")}; the Lite forms have {sizes} blocks and inputs of it. Its tensors '
                   f'begin {list(tensors)[:3]}. Give the state dict of an EfficientNet-Lite.')
