"""Models out of folders in Hugging Face's layout: config.json, tokenizer.json and weights in safetensors.

    there = folder.Folder('models/Qwen3-0.6B')    # reads config.json; the weights stay on disk
    model = there.model()                         # what its family makes of it, parameters in float32
    tokenizer = there.tokenizer()                 # tokenizers.Tokenizer
    there.facts()['base']                         # 'bfloat16'

Weights are one file, model.safetensors, or several that model.safetensors.index.json lists
(https://huggingface.co/docs/safetensors). Pickles (*.bin) are never opened: to read one is to run it.
"""

import collections
import collections.abc
import json
import math
import pathlib

import jax.numpy as jnp
import safetensors

from qat.models.pretrained import fill
from qat.models.pretrained import tokenizer
from qat.models.pretrained.families import FAMILIES
from qat.models.pretrained.family import Settings

ONE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
FLOATS = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


class Folder:
  """A folder of a published model: its settings in memory, its tensors on disk."""

  def __init__(self, path):
    self.path = pathlib.Path(path)
    where = self.path / 'config.json'
    self.settings = Settings(_json(where), where)
    kind = self.settings.get('model_type')
    if not isinstance(kind, str) or kind not in FAMILIES:
      raise ValueError(f'{where}: its model_type is {kind!r}; the families known are {sorted(FAMILIES)}. '
                       'Take a model of one of them.')
    if self.settings.get('quantization_config'):
      raise ValueError(f'{where}: its weights are codes (quantization_config), and folders are read of floating-point '
                       'numbers only. Take the checkpoint that they were quantized from.')
    self.family = FAMILIES[kind]
    self.tensors = Tensors(self.path, self.family.prefix)

  def model(self, dtype='float32'):
    """The network that the folder holds; its layers compute in `dtype`, its parameters are float32."""
    family, config = self.family, self.shape()
    return fill.fill(
        lambda: family.make_model(config, jnp.dtype(dtype)), self.tensors, family.table, self.path, family.ignored)

  def shape(self):
    """The sizes and the form of the network: decoder.Config or encoder.Config."""
    return self.family.make_config(self.settings)

  def tokenizer(self):
    """The tokenizers.Tokenizer of the folder, or None if there is no tokenizer.json."""
    return tokenizer.from_json(self.path) if (self.path / 'tokenizer.json').exists() else None

  def facts(self):
    """What to print beside numbers that are measured on this model: dict.

    `base` is the dtype of most of the weights.
    """
    sizes, counts = collections.Counter(), collections.Counter()
    for kind, shape in self.tensors.headers():
      sizes[kind] += math.prod(shape)
      counts[kind] += 1
    most = max(sizes, key=sizes.get)
    return dict(
        name=self.path.resolve().name, base=FLOATS.get(most, most), parameters=sum(sizes.values()),
        tensors=', '.join(f'{n} {kind}' for kind, n in counts.most_common()))


class Tensors(collections.abc.Mapping):
  """The tensors of a folder's files by name, without the prefix: read when they are asked for."""

  def __init__(self, path, prefix):
    self.path = path
    self.files = {file: _open(path / file) for file in _files(path)}
    self.places = {}
    for file, reader in self.files.items():
      for name in reader.keys():
        if (short := name.removeprefix(prefix)) in self.places:
          raise ValueError(f'{path}: tensor {short!r} is there twice, in {self.places[short][0]} as '
                           f'{self.places[short][1]!r} and in {file} as {name!r}. Get the folder anew.')
        self.places[short] = file, name
    if not self.places:
      raise ValueError(f'{path}: its {ONE} has no tensors. It is not whole: get it anew.')

  def __getitem__(self, name):
    file, name = self.places[name]
    kind = self.files[file].get_slice(name).get_dtype()
    if kind not in FLOATS:
      raise ValueError(f'{self.path / file}: tensor {name!r} is of type {kind}; weights are read from '
                       f'{", ".join(FLOATS)}. Take the checkpoint that it was quantized from.')
    return self.files[file].get_tensor(name)

  def __contains__(self, name):
    return name in self.places  # Mapping's own would read it

  def __iter__(self):
    return iter(self.places)

  def __len__(self):
    return len(self.places)

  def headers(self):
    """Type and shape of each tensor."""
    for file, name in self.places.values():
      header = self.files[file].get_slice(name)
      yield header.get_dtype(), header.get_shape()


def _files(path):
  """The names of the files that hold the weights."""
  if (path / ONE).exists():
    return [ONE]
  if not (path / INDEX).exists():
    there = sorted(p.name for p in path.iterdir())
    raise FileNotFoundError(f'{path}: there is no {ONE}, and no {INDEX}; there is {there[:8]}. Weights in pickles '
                            '(.bin, .pt) are not read: get the model in safetensors.')
  places = _json(path / INDEX).get('weight_map')
  if not isinstance(places, dict) or not places or not all(
      isinstance(file, str) and pathlib.PurePath(file).name == file for file in places.values()):
    raise ValueError(f'{path / INDEX}: its weight_map should give the file in this folder that each tensor is in. '
                     'Get it anew.')
  files = sorted(set(places.values()))
  _check_index(path, files, places)
  return files


def _check_index(path, files, places):
  """The files that the index lists are there, and hold what it says."""
  if missing := [file for file in files if not (path / file).exists()]:
    raise FileNotFoundError(f'{path}: {len(missing)} of the {len(files)} files that {INDEX} lists are missing, the '
                            f'first {missing[0]}. Get them.')
  there = {(name, file) for file in files for name in _open(path / file).keys()}
  if wrong := sorted(there ^ set(places.items())):
    name, file = wrong[0]
    raise ValueError(f'{path}: {INDEX} and the files disagree on {len(wrong)} tensors, the first {name!r} in {file}. '
                     'They are not of one model: get the folder anew.')


def _open(path):
  """A reader of a safetensors file, mapped into memory."""
  try:
    return safetensors.safe_open(path, framework='numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{path}: {path.stat().st_size} bytes that are no whole safetensors file ({error}). '
                     'It was cut or damaged: delete it, and get it anew.') from error


def _json(path):
  """The object in a JSON file."""
  if not path.is_file():
    raise FileNotFoundError(f"{path}: there is no such file. Give a folder in Hugging Face's layout, with config.json "
                            f'and {ONE}.')
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: it is no JSON ({error}). It was cut or damaged: get it anew.') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: it holds a {type(value).__name__}, and should hold an object. Get it anew.')
  return value
