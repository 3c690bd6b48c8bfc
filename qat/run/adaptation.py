"""From a config of `qat finetune` to what it names: texts, base, adapters, optimizer.

Of the network, adapters are `params`, which train and are in checkpoints; codes and floats are the base, which no step
writes, and which is made anew from the config when a run goes on: its fingerprint says that it is the same.
"""

import dataclasses
import hashlib

import jax
from flax import nnx
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from qat.models import decoder
from qat.models.pretrained import tokenizer as tokenizers
from qat.nn import adapters
from qat.nn import lora
from qat.nn import lora_init
from qat.nn import recipes
from qat.nn import transform
from qat.nn import weights
from qat.run import build
from qat.run import chat
from qat.run import classification
from qat.run import data
from qat.run import mesh
from qat.run import names
from qat.run import offload
from qat.run import optim
from qat.run import packing
from qat.run import published
from qat.run import remat
from qat.run import scorer
from qat.run import state as states
from qat.run import texts

# Where adapters start, by name: (on codes, on floats), a value of qat/nn/lora_init.py; None where there is none.
RANDOM = lora_init.Random(lora_init.gaussian)
INITS = dict(gaussian=(RANDOM, RANDOM), kaiming=(lora_init.Random(), lora_init.Random()),
             loftq=(lora_init.LoftQ(), None), pissa=(lora_init.QPiSSA(), lora_init.PiSSA()))
HEAD = classification.HEAD
PACKINGS = dict(stream=packing.stream, rows=packing.rows, rows_by_length=packing.rows_by_length)


def run(config, devices=mesh.ONE):
  """The build.Run of a config, in its places on `devices`."""
  memory = offload.memory(config.optimizer.memory)
  network = published.load(config.pretrained, config.dtype)
  if HEAD in config:
    floats, (train, test) = classification.with_head(network, config), classification.sources(config, network)
  else:
    check_model(config, network.model)
    floats, (train, test) = network.model, sources(config, network)
  model, facts = adapted(floats, config), network.facts
  del network, floats                                                    # Where codes took their place.
  model = devices.constrained(model)
  skeleton, params, rest = states.take_apart(model, *filters(config))
  tx, rate = optim.optimizer(config, params)
  goal = build.objective(config)
  about = dict(network=facts, base_sha256=fingerprint(skeleton.base))
  skeleton, state = devices.begin(model, skeleton, params, rest, tx)
  return build.Run(config, goal, train, skeleton, state, tx, rate,
                   scorer.Scorer(goal, test, config.eval.batch_size, devices), memory, devices, about)


def filters(config):
  """What trains, and what is fixed: filters of nnx. Without adapters, every Param trains; a head trains always."""
  if not config.adapter.rules:
    return nnx.Param, nnx.Nothing()
  head = [nnx.All(nnx.Param, lambda path, _: path[0] == HEAD)] if HEAD in config else []
  return nnx.Any(adapters.LoRAParam, *head), nnx.Any(nnx.Param, weights.Codes)


def adapted(model, config):
  """The network that trains: `model` on the grid of `config.recipe`, with the adapters of `config.adapter`."""
  c, coded = config.adapter, weights.any_codes(model)
  if coded and (config.recipe or not c.rules):
    raise ValueError(f'pretrained {config.pretrained!r} holds codes, which stay as they are, and the config would '
                     f'{"put floats on a grid" if config.recipe else "train all weights"}. Give adapters and no '
                     'recipe, or what qat merge --into float made.')
  if not c.rules and config.recipe:
    raise ValueError('adapter.rules is empty, so that all weights would train, and the recipe puts them on a grid: '
                     'codes do not train. Name layers in adapter.rules, or give no recipe; qat train trains on a grid.')
  if config.recipe:
    model = transform.quantize(model, recipes.resolve(config.recipe.to_dict()))
  if c.rules:
    start, needs_floats = _start(c.init, c.options.to_dict(), bool(config.recipe), coded)
    model = model if needs_floats else transform.freeze(model)
    scaling = names.resolve(adapters, c.scaling, 'adapter.scaling')
    # The threads of OpenBLAS wait for each other by spinning: on busy cores LoftQ took 6 times the time with two.
    with threadpoolctl.threadpool_limits(1, 'blas'):
      model = lora.lora(model, list(c.rules), c.rank, c.alpha, rngs=nnx.Rngs(config.seed), init=start, dora=c.dora,
                        group=c.group, dropout=c.dropout, scaling=scaling)
      jax.block_until_ready(nnx.state(model))
    model = transform.freeze(model)
  return remat.remat(model, config.remat) if config.remat else model


def _start(name, options, on_codes, coded):
  """(the value of lora_init, whether it takes the floats that the codes stand for); `coded`: there are none."""
  if name not in INITS:
    raise ValueError(f'adapter.init {name!r}: there is none of that name. {names.suggest(name, INITS)}')
  if coded and not isinstance(INITS[name][0], lora_init.Random):
    raise ValueError(f'adapter.init {name!r} starts from the floats that codes stand for, and pretrained has codes '
                     'alone. Give init=gaussian.')
  start = INITS[name][0 if on_codes else 1]
  if start is None:
    raise ValueError(f'adapter.init {name!r} starts from what rounding took away, and the recipe leaves floats. Give a '
                     'recipe that has codes, or init=gaussian.')
  known = {field.name for field in dataclasses.fields(start)}
  if wrong := sorted(set(options) - known):
    raise ValueError(f'adapter.options {wrong} of {name!r}: those it has are {sorted(known)}. Leave out the others.')
  start = dataclasses.replace(start, **options)
  return start, on_codes and not isinstance(start, lora_init.Random)


def sources(config, network):
  """(training sequences, test sequences), packing.Sequences."""
  c, e = config.data, config.eval
  where = published.origin(published.located(config.pretrained))
  tokenizer = tokenizers.from_json(config.tokenizer) if config.tokenizer else network.tokenizer
  if tokenizer is None:
    raise ValueError(f'pretrained {config.pretrained!r} has no tokenizer beside its weights: texts cannot be read. Put '
                     'a tokenizer.json beside them, or name one as --config.tokenizer.')
  reader = texts.Reader(tokenizer, chat.read(where), config.tokenizer or str(where))
  pad = reader.token(c.separator)
  if c.packing not in PACKINGS:
    raise ValueError(f'data.packing {c.packing!r}: there is none of that name. {names.suggest(c.packing, PACKINGS)}')
  train, test = (texts.load(c.name, split, reader, **c.options) for split in ('train', 'test'))
  held = [piece for d in test for piece in packing.pieces(d, e.length)][:e.sequences]
  made = PACKINGS[c.packing](train, c.length, pad), packing.Whole(packing.rows(held, e.length, pad))
  for source in made:
    _check_tokens(source, network.model.config.vocab_size, reader)
  return made


def _check_tokens(source, vocab_size, reader):
  if (highest := int(source.tokens.max())) >= vocab_size:
    raise ValueError(f'The tokenizer of {reader.where} gives token {highest}, and the network knows {vocab_size}: it '
                     'is the tokenizer of another network. Give that of this one.')


def check_model(config, model):
  """Raises where the network is no decoder, or sequences are longer than its context."""
  if not isinstance(model, decoder.Decoder):
    raise ValueError(f'pretrained {config.pretrained!r} is a {type(model).__name__}: decoders are fine-tuned here. '
                     'Give one, such as smollm2.')
  there = model.config.context_length
  for leaf, length in (('data.length', config.data.length), ('eval.length', config.eval.length)):
    if not 2 <= length <= there:
      raise ValueError(f'--config.{leaf}={length}: sequences have from 2 tokens to the {there} that the network was '
                       'built for. Choose a length within.')


def fixed(model, config):
  """What no step changes of a model: {path: array}."""
  return states.take_apart(model, *filters(config))[0].base


def grid(recipe):
  """A recipe in words: the grids of the layers that it names, or of all; without one the base is what it was."""
  return ', '.join(map(str, (recipe.get('rules') or recipe).values())) if recipe else 'as it is'


def fingerprint(arrays):
  """SHA-256 of {path: array}: names, types, shapes and bytes."""
  digest = hashlib.sha256()
  for path in sorted(arrays):
    x = arrays[path]
    x = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    digest.update(f'{path} {x.dtype} {x.shape}\n'.encode())
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()


def batches(run):
  """The training batches of a Run."""
  size = run.config.data.batch_size
  return data.batches(run.train, size, seed=run.config.seed, rows=run.devices.rows(size))
