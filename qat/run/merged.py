"""What `qat merge` left, read as published networks are: it is scored, fine-tuned further, and exported.

    network = published.load('runs/lora/merged/grid_gptq')     # frozen, of codes; of merged/float, in floats
    qat evaluate --workdir runs/lora/merged/grid_gptq
    qat finetune --config configs/lora.py:workdir=runs/lora/merged/grid_gptq,base=float --workdir runs/more
    qat ptq --config configs/smollm2.py --config.pretrained=runs/lora/merged/float --workdir runs/w4

A folder holds every array of the network. What it is built like, and its tokenizer, are those of the network that was
fine-tuned: `pretrained` in its config.json, which must be where it was.
"""

import contextlib
import dataclasses
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.models import decoder
from qat.models import rope
from qat.models.pretrained import families
from qat.models.pretrained import fill
from qat.models.pretrained import folder
from qat.nn import lora
from qat.nn import merge
from qat.nn import recipes
from qat.nn import transform
from qat.nn import weights
from qat.run import checkpoint
from qat.run import config as configs
from qat.run import errors
from qat.run import solved
from qat.run import state as states

STEP = 0                     # Of its one checkpoint.
WEIGHTS = folder.ONE         # Where all are floats.
ANEW = 'Merge again: qat merge.'
# Into what -> what becomes of a network with adapters. On the grid of the base, it is built like the base.
FORMS = dict(float=merge.merge, zeros=merge.merge_pooled)


def is_merged(path):
  """Whether `qat merge` left the folder: its config.json says how it was merged."""
  return {'merged', 'pretrained'} <= set(_config(path))


def refuse(path):
  """Raises where adapters are and no network is: at the workdir of `qat finetune`, and at its folder `merged`."""
  path = pathlib.Path(path)
  run = path.parent if path.name == 'merged' and not _config(path) else path
  if 'adapter' in _config(run) and not is_merged(run):
    there = sorted(str(p.parent) for p in run.glob('merged/*/config.json'))
    ready = f'There are {there}.' if there else f'There is none yet: qat merge --workdir {run} makes one.'
    raise ValueError(f'{path} is of a run of qat finetune, which holds no network of its own. Give one of the folders '
                     f'that qat merge makes of it. {ready}')


def _config(path):
  """config.json of a folder as a dict; an empty one where there is none, or it is cut: its reader says so."""
  with contextlib.suppress(OSError, ValueError):
    found = json.loads((pathlib.Path(path) / 'config.json').read_text())
    return found if isinstance(found, dict) else {}
  return {}


class Merged:
  """A folder of `qat merge`: its config in memory, its arrays on disk."""

  def __init__(self, path, read):
    """Args: path: of the folder; read: name or path of a published network -> what reads it (published.py)."""
    self.path, self.config = pathlib.Path(path), configs.load(path)
    name = self.config.pretrained
    if 'into' not in self.config.merged or pathlib.Path(name).resolve() == self.path.resolve():
      raise ValueError(f'{self.path}: its config.json names pretrained {name!r} and merged '
                       f'{self.config.merged.to_dict()}, which qat merge does not write. {ANEW}')
    try:
      self.base = read(name)
    except (ValueError, OSError) as error:
      raise ValueError(f'{self.path}: it was merged from pretrained {name!r}, whose sizes and tokenizer it has, and '
                       f'which cannot be read: {errors.join(error)} Put it back there.') from error
    if not hasattr(self.base, 'shape') or not isinstance(self.base.shape(), decoder.Config):
      raise ValueError(f'{self.path}: its config.json names pretrained {name!r}, which is no decoder now. '
                       'Put back the network that was fine-tuned, or merge again.')
    self.family = getattr(self.base, 'family', families.FAMILIES['llama'])
    if (self.path / WEIGHTS).exists() == bool(checkpoint.steps(self.path)):
      raise ValueError(f'{self.path}: it should hold one of {WEIGHTS} and checkpoints/, and there is '
                       f'{sorted(p.name for p in self.path.iterdir())}. {ANEW}')

  def model(self, dtype='float32'):
    """The network that was merged, bit for bit where it holds codes; its layers compute in `dtype`."""
    if (self.path / WEIGHTS).exists():
      return self._floats(dtype)
    model = self.abstract(dtype)
    like = arrays(model)
    try:
      found, _ = checkpoint.read(self.path, STEP, {name: _stored(x) for name, x in like.items()})
    except checkpoint.Damaged as error:
      raise ValueError(f'{self.path}: it is not whole. {errors.join(error)} {ANEW}') from error
    except ValueError as error:
      raise ValueError(f'{self.path}: it was merged from another network than pretrained {self.config.pretrained!r} is '
                       f'now. {errors.join(error)} Put that one back, or merge again.') from error
    return with_arrays(model, {name: x.astype(like[name].dtype) for name, x in found.items()})

  def _floats(self, dtype):
    """The network of a safetensors file, which turns the halves of a head."""
    shape = self.shape()
    return fill.fill(lambda: self.family.make_model(shape, jnp.dtype(dtype)),
                     folder.Tensors(self.path, self.family.prefix), self.family.table, self.path, self.family.ignored)

  def abstract(self, dtype='float32', shape=None):
    """The network, of shapes alone; of other sizes than its own, if a decoder.Config is given."""
    return abstract(self.base, self.config, dtype, self.shape() if shape is None else shape)

  def shape(self):
    """The decoder.Config of the network."""
    shape = self.base.shape()
    if (self.path / WEIGHTS).exists() and shape.rope is not None:        # Stored in Hugging Face's order.
      return dataclasses.replace(shape, rope=dataclasses.replace(shape.rope, turn=rope.halves))
    return shape

  def tokenizer(self):
    """The tokenizers.Tokenizer of the network that was fine-tuned, or None."""
    return self.base.tokenizer()

  def facts(self):
    """What to print beside numbers that are measured on this network."""
    c, below = self.config.merged, self.base.facts()
    by = '' if c.into in FORMS else f' by {c.method}'
    return {name: x for name, x in below.items() if name != 'tensors'} | dict(
        base=f'{self.config.pretrained}, on {below["base"]}, fine-tuned and merged into {c.into}{by}')


def abstract(base, config, dtype, shape=None):
  """What merging makes of the network that `base` reads, of shapes alone."""
  shape = base.shape() if shape is None else shape
  below = base.abstract if isinstance(base, Merged) else (
      lambda dtype, shape: decoder.Decoder(shape, nnx.Rngs(0), jnp.dtype(dtype)))
  return nnx.eval_shape(lambda: built(below(dtype, shape), config))


def built(model, config):
  """What merging makes of `model`, which was fine-tuned by `config`: of that structure, with other arrays."""
  if config.recipe:
    model = transform.freeze(transform.quantize(model, recipes.resolve(config.recipe.to_dict())))
  if config.merged.into not in FORMS:
    return model
  c = config.adapter
  return FORMS[config.merged.into](lora.lora(model, list(c.rules), c.rank, c.alpha, group=c.group))


def arrays(model):
  """{path: array} of everything in a network."""
  _, params, rest = states.take_apart(model)
  return params | rest


def with_arrays(model, found):
  """The network of the structure of `model` that holds {path: array}."""
  skeleton, params, rest = states.take_apart(model)
  return skeleton.join(*({name: found[name] for name in part} for part in (params, rest)))


def _stored(x):
  """The shape of an array as the checkpoint has it."""
  return jax.ShapeDtypeStruct(x.shape, solved.storable(np.empty(0, x.dtype)).dtype)


def check(model, base, config):
  """Raises where a solver made other kinds of arrays than the base has: what is written would not be read back.

  Args:
    model: without adapters, of codes.
    base: what reads the network that was fine-tuned.
    config: of the run, with `merged`, which says how.
  """
  made, like = form(model), form(abstract(base, config, config.dtype))
  if other := sorted(name for name in {*made, *like} if made.get(name) != like.get(name)):
    first = other[0]
    raise ValueError(f'{config.merged.method!r} leaves {first} as {made.get(first)}, and the grid of the base has '
                     f'{like.get(first)}: this would not be read back. Take another --method.')


def write(model, path):
  """Writes a network of codes to a folder."""
  with checkpoint.Checkpoints(path, lambda metrics: 0.0, 1) as store:
    store.save(STEP, {name: solved.storable(np.asarray(x)) for name, x in arrays(model).items()}, {})


def form(model):
  """{path: shape and dtype, or the Spec of codes}: what reading relies on."""
  codes = nnx.to_flat_state(nnx.state(model, weights.Codes))
  specs = {'/'.join(map(str, path)): v.get_value().spec for path, v in codes}
  return specs | {name: (x.shape, x.dtype.name) for name, x in arrays(model).items()}
