"""What fine-tuning takes of memory, before anything is run: `qat finetune --plan`.

The network is built of shapes alone, at 2 and at 3 blocks, and the very step that would train it is compiled for both;
what a block adds is added for each that is left. So a plan for 70B parameters takes as long as one for 135M. XLA says
what the step holds besides its arguments: activations, gradients, and what it works with.

Codes are counted twice: as they are in memory here, a byte or half of one each, and packed as in a file.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from qat.models import decoder
from qat.nn import weights
from qat.run import adaptation
from qat.run import build
from qat.run import merged
from qat.run import names
from qat.run import offload
from qat.run import optim
from qat.run import published
from qat.run import state as states

DEPTHS = 2, 3

_SIZES = ('vocab_size', 'context_length', 'width', 'layers', 'heads', 'kv_heads', 'ffn_width')
# The config.json of each, by the names above; heads have 128 features, and no head is tied.
SHAPES = {name: dict(zip(_SIZES, sizes)) for name, sizes in dict(
    llama_33b=(32000, 2048, 6656, 60, 52, 52, 17920),
    llama_65b=(32000, 2048, 8192, 80, 64, 64, 22016),
    llama2_7b=(32000, 4096, 4096, 32, 32, 32, 11008),
    llama2_13b=(32000, 4096, 5120, 40, 40, 40, 13824),
    llama2_70b=(32000, 4096, 8192, 80, 64, 8, 28672),
    llama3_8b=(128256, 8192, 4096, 32, 32, 8, 14336),
    llama3_70b=(128256, 8192, 8192, 80, 64, 8, 28672),
    mistral_7b=(32000, 32768, 4096, 32, 32, 8, 14336)).items()}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Bytes, by what takes them. Prints as a table.

  Attributes:
    title: what was planned, in words.
    bytes: {what: bytes in memory}.
    packed: {what: bytes in a file}, of the base.
  """
  title: str
  bytes: dict
  packed: dict

  @property
  def total(self):
    return sum(self.bytes.values())

  def __str__(self):
    rows = [(what, n, self.packed.get(what)) for what, n in self.bytes.items()]
    rows.append(('total', self.total, None))
    text = lambda n: '' if n is None else f'{n / 2**20:,.1f}'
    lines = [f'{what:<28}{text(n):>14}{text(packed):>14}' for what, n, packed in rows]
    return '\n'.join([self.title, f'{"MiB":<28}{"in memory":>14}{"packed":>14}', *lines])


def plan(config):
  """The Plan of a config of `qat finetune`; config.pretrained may be one of SHAPES as well."""
  shape = shape_of(config.pretrained)
  parts = [_measured(config, dataclasses.replace(shape, layers=n)) for n in DEPTHS if n < shape.layers]
  if len(parts) < 2:
    parts = [_measured(config, shape)] * 2
  more = shape.layers - DEPTHS[1]
  grown = [{what: high[what] + more * (high[what] - low[what]) for what in high}
           for low, high in zip(*parts)]
  c, grid = config.optimizer, adaptation.grid(config.recipe)
  rank = f'rank {config.adapter.rank}' if config.adapter.rules else 'all parameters train'
  title = (f'{config.pretrained}: {grid}, {rank}, {config.data.batch_size} x {config.data.length} tokens in '
           f'{c.accumulate_steps} parts, {config.dtype}, {c.name} in {c.state_bits} bits, '
           f'{"remat " + config.remat if config.remat else "no remat"}, as {jax.default_backend()} runs it')
  return Plan(title, *grown)


def shape_of(name):
  """The decoder.Config of a name of SHAPES, or of a published network."""
  if name in SHAPES:
    sizes = SHAPES[name]
    return decoder.Config(**(decoder.LLAMA | dict(head_dim=128, tied_head=False) | sizes))
  reader = reader_of(name)
  found = reader.shape() if hasattr(reader, 'shape') else None
  if not isinstance(found, decoder.Config):
    raise ValueError(f'pretrained {name!r} is no decoder, and plans are for those. Give one, or of {list(SHAPES)}.')
  return found


def reader_of(name):
  """What reads a published network; None for a name of SHAPES."""
  if name in SHAPES:
    return None
  if name not in published.PUBLISHED and not any(c in name for c in './'):
    raise ValueError(f'pretrained {name!r}: there is no such network, and no such shape to plan. '
                     f'{names.suggest(name, [*published.PUBLISHED, *SHAPES])}')
  return published.reader(published.located(name))


def abstract(config, shape):
  """The network that would train, of shapes alone."""
  reader, dtype = reader_of(config.pretrained), jnp.dtype(config.dtype)
  base = reader.abstract if isinstance(reader, merged.Merged) else (
      lambda dtype, shape: decoder.Decoder(shape, nnx.Rngs(0), dtype))
  return nnx.eval_shape(lambda: adaptation.adapted(base(dtype, shape), config))


def compiled(config, shape):
  """(model, TrainState, XLA's account of the compiled step), all of shapes alone."""
  model = abstract(config, shape)
  skeleton, params, rest = states.take_apart(model, *adaptation.filters(config))
  tx, _ = optim.optimizer(config, params)
  state = jax.eval_shape(lambda params, rest: states.new(params, rest, tx), params, rest)
  b, t = config.data.batch_size, config.data.length
  batch = dict(tokens=jax.ShapeDtypeStruct((b, t), jnp.int32), weights=jax.ShapeDtypeStruct((b, t - 1), jnp.float32))
  step = states.base_step(skeleton, build.objective(config), tx, config.optimizer.accumulate_steps,
                          offload.memory(config.optimizer.memory))
  return model, state, step.lower(state, skeleton.base, batch).compile().memory_analysis()


def _measured(config, shape):
  """({what: bytes in memory}, {what: bytes packed}) of a network of this shape."""
  model, state, xla = compiled(config, shape)
  found, packed = base(model, config)
  adapters, gradients = size(state.params), sum(4 * x.size for x in jax.tree.leaves(state.params))
  trained = 'adapters' if config.adapter.rules else 'weights'
  found |= {trained: adapters, 'gradients': gradients, 'optimizer': size(state.opt_state),
            'activations and workspace': xla.temp_size_in_bytes - gradients}
  return found, packed


def base(model, config):
  """({what: bytes in memory}, {what: bytes packed}) of what is fixed."""
  codes = [v.get_value() for v in nnx.to_flat_state(nnx.state(model, weights.Codes)).leaves]
  floats = size(adaptation.fixed(model, config)) - size(codes)
  numbers = sum(size(q.codes) for q in codes)
  packed = sum(q.nbits for q in codes) / 8
  only_codes = sum(q.size * q.spec.format.bits for q in codes) / 8
  found = {'codes': numbers, 'scales and zeros': size(codes) - numbers, 'floats': floats}
  return found, {'codes': only_codes, 'scales and zeros': packed - only_codes, 'floats': floats}


def size(tree):
  """Bytes of a pytree of arrays, or of their shapes; a random key is two words."""
  return sum(8 * x.size if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.size * x.dtype.itemsize
             for x in jax.tree.leaves(tree))
