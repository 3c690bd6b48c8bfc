"""Float networks that `qat train` left, read as published ones are: `qat finetune` goes on from them.

    network = published.load('runs/shakespeare')  # the workdir, best checkpoint
    network.tokenizer.encode('To be').ids         # where the data was text
"""

import json
import pathlib

from flax import nnx

from qat.models.pretrained import families
from qat.run import build
from qat.run import config as configs
from qat.run import shakespeare

# By the data that a network learned from: what reads texts as it did.
TOKENIZERS = dict(shakespeare=shakespeare.tokenizer)
# By the form of a decoder: how Hugging Face names its parts.
FAMILIES = {'decoder.llama': 'llama', 'decoder.gpt': 'gpt2'}


def is_workdir(path):
  """Whether `qat train` left the folder: its config.json says what was trained on which data."""
  path = pathlib.Path(path) / 'config.json'
  try:
    found = json.loads(path.read_text()) if path.is_file() else None
  except ValueError:  # Cut or damaged: whoever reads the folder says so.
    return False
  return isinstance(found, dict) and {'data', 'model', 'objective'} <= set(found)


class Workdir:
  """The folder of a finished float run."""

  def __init__(self, path):
    self.path, self.config = pathlib.Path(path), configs.load(path)
    name = self.config.model.name
    self.family = families.FAMILIES.get(FAMILIES.get(name))

  def model(self, dtype='float32'):
    """The network of the best checkpoint; its layers compute in `dtype`, its parameters are float32."""
    config = self.config.copy_and_resolve_references()
    with config.unlocked():
      config.model.dtype = str(dtype)
    return build.pretrained(build.float_model(config), self.path)

  def shape(self):
    """The decoder.Config of the network, or None if it is no decoder."""
    return getattr(nnx.eval_shape(lambda: build.float_model(self.config)), 'config', None)

  def tokenizer(self):
    """The tokenizers.Tokenizer that reads texts as the network's data was read, or None if that was no text."""
    make = TOKENIZERS.get(self.config.data.name)
    return make and make()

  def facts(self):
    """What to print beside numbers that are measured on this network."""
    return dict(base='float32', network=self.config.model.name, data=self.config.data.name, seed=self.config.seed)
