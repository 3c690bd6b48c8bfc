"""Where arrays live: on one device, or split over a mesh of many, as GSPMD does it.

    --config.mesh.data=4 --config.mesh.model=2

The axes of the mesh: `data` and `fsdp` share out the examples of a batch, `fsdp` the parameters and the optimizer's
state as well, `model` each layer's matrices, `sequence` the tokens of what blocks return. The step is the one that
one device runs: arrays come to jax.jit with their sharding, and the compiler divides the work and adds what must be
exchanged. Maxima, counts and int8 products are the same to the bit then; sums of floats are added in another order.

Xu et al. GSPMD, 2021. https://arxiv.org/abs/2105.04663
"""

import collections
import dataclasses
import functools
import math

from flax import nnx
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from qat.nn import quantized
from qat.run import hosts
from qat.run import sharding
from qat.run import state as states

AXES = ('data', 'fsdp', 'sequence', 'model')  # Neighbours exchange most, so `model` is innermost.
BATCH = ('data', 'fsdp')


def make(config):
  """What a config's `mesh` names: ONE, or a Mesh of all devices of all processes."""
  sizes = config.mesh.to_dict()
  for axis, n in sizes.items():
    if n < 1:
      raise ValueError(f'--config.mesh.{axis}={n}: it counts devices. Give 1 or more.')
  count, asked = jax.device_count(), math.prod(sizes.values())
  if asked == 1 and jax.process_count() == 1:
    return ONE
  if asked != count:
    product = ' x '.join(f'{axis} {sizes[axis]}' for axis in AXES)
    where = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
    raise ValueError(f'The mesh {product} is of {asked} devices: there are {count}{where} '
                     f'({jax.devices()[0].device_kind}). Choose --config.mesh.<axis> whose product is {count}'
                     f'{"" if where else ", or leave them all at 1 for one device"}.')
  rows = sizes['data'] * sizes['fsdp'] * config.optimizer.get('accumulate_steps', 1) if 'optimizer' in config else 1
  if 'optimizer' in config and config.data.batch_size % rows:
    raise ValueError(f'data.batch_size {config.data.batch_size}: it is not a multiple of mesh.data={sizes["data"]} * '
                     f'mesh.fsdp={sizes["fsdp"]} * optimizer.accumulate_steps='
                     f'{config.optimizer.accumulate_steps}, by which a batch is shared out. Choose one that is.')
  params = sharding.table(config, 'sharding', sizes, sharding.DEFAULT)
  activations = sharding.table(config, 'activation_sharding', sizes, sharding.ACTIVATIONS)
  # Auto: the compiler propagates. Explicit would put shardings into the types that models see.
  mesh = jax.make_mesh([sizes[a] for a in AXES], AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return Mesh(mesh, sizes, tuple(params), tuple(activations))


def alone(devices, program):
  """`devices`, for a program that runs in one process."""
  if jax.process_count() > 1:
    raise ValueError(f'{program} runs in one process, and there are {jax.process_count()}. Start it once, on a machine '
                     'that has all the devices of the mesh.')
  return devices


class OneDevice:
  """All on the first device, where jax puts it: the placement that places nothing."""

  def constrained(self, model):
    """`model`, whose modules keep to the rules for activations."""
    return model

  def begin(self, model, skeleton, params, rest, tx):
    """(Skeleton, TrainState) before the first step, in their places."""
    return skeleton, states.new(params, rest, tx)

  def module(self, model):
    """`model`, its arrays in their places."""
    return model

  def rows(self, batch_size):
    """Which rows of a batch this process reads: i64[n], or None for all."""
    return None

  def put(self, batch, batch_size):
    """{key: [n, ...]}, the rows that this process has read -> {key: [batch_size, ...]}, in their places."""
    return batch

  def batches(self, batches):
    """[([n, ...], ...)], a list of tuples of arrays, in their places."""
    return batches

  def after(self, state, memory):
    """Where a step leaves its results: what jax.jit takes as `out_shardings`."""
    return None

  def facts(self, **trees):
    """The mesh, and the bytes that each tree of arrays takes, for result.json; {} without a mesh."""
    return {}


ONE = OneDevice()


@dataclasses.dataclass(frozen=True)
class Mesh(OneDevice):
  """All devices, in a grid.

  Attributes:
    mesh: jax's.
    sizes: {axis: devices along it}.
    params, activations: the Rules of qat/run/sharding.py.
  """
  mesh: jax.sharding.Mesh
  sizes: dict
  params: tuple
  activations: tuple

  def constrained(self, model):
    model = nnx.clone(model)
    modules = dict(quantized.walk(model))
    for path, rule in sharding.first_matches(self.activations, modules, 'activation_sharding', 'module').items():
      if rule is not None:
        modules[path].__class__ = constrained_type(type(modules[path]), self.mesh, rule.axes)
    return model

  def begin(self, model, skeleton, params, rest, tx):
    params, rest, base = self._place(model, params, rest, skeleton.base)
    whole = self.named(())
    shapes = jax.eval_shape(tx.init, params)
    follow = functools.partial(self._follow, params)
    homes = jax.tree_util.tree_map_with_path(follow, shapes)
    opt_state = jax.jit(tx.init, out_shardings=homes)(params)
    step, finite = hosts.put(np.int32(0), whole), hosts.put(np.bool_(True), whole)
    return dataclasses.replace(skeleton, base=base), states.TrainState(step, params, rest, opt_state, finite)

  def _place(self, model, *dicts):
    """Each {path: array} of a model, in its place."""
    split = {path: self.named(axes) for path, axes in sharding.placed(model, self.params, self.sizes).items()}
    whole = self.named(())
    return [{path: hosts.put(x, split.get(path, whole)) for path, x in arrays.items()} for arrays in dicts]

  def module(self, model):
    skeleton, params, rest = states.take_apart(model)
    return skeleton.join(*self._place(model, params, rest))

  def _follow(self, params, keys, x):
    """The sharding of an array of the optimizer's state: as the parameter that its key path names."""
    name = next((k.key for k in keys if getattr(k, 'key', None) in params), None)
    if name is None:
      return self.named(())
    spec = params[name].sharding.spec
    entries = tuple((e,) if isinstance(e, str) else e or () for e in spec)
    shape = params[name].shape
    if x.ndim != len(shape):
      return self.named(())                                              # Factored moments, scales of flat blocks.
    return self.named(sharding.follow(entries + ((),) * (len(shape) - len(entries)), shape, x.shape, self.sizes))

  def named(self, axes):
    """The NamedSharding of [(axes of the mesh)] for each axis of an array."""
    return NamedSharding(self.mesh, PartitionSpec(*(entry or None for entry in axes)))

  def shared(self, batch_size):
    """Whether a batch of that many rows is shared out."""
    return batch_size % math.prod(self.sizes[a] for a in BATCH) == 0

  def of_batch(self, batch_size):
    return self.named((BATCH,) if self.shared(batch_size) else ())

  def rows(self, batch_size):
    here = self.of_batch(batch_size).addressable_devices_indices_map((batch_size,)).values()
    found = np.unique(np.concatenate([np.arange(batch_size)[index] for index in here]))
    return None if len(found) == batch_size else found

  def put(self, batch, batch_size):
    home = self.of_batch(batch_size)
    return {key: jax.make_array_from_process_local_data(home, np.asarray(x), (batch_size, *x.shape[1:]))
            for key, x in batch.items()}

  def batches(self, batches):
    rows = len(batches[0][0])
    if not self.shared(rows):
      raise ValueError(f'calibration.batch_size {rows}: it is not a multiple of mesh.data={self.sizes["data"]} * '
                       f'mesh.fsdp={self.sizes["fsdp"]}, by which a batch is shared out. Choose one that is.')
    return [tuple(jax.device_put(x, self.of_batch(rows)) for x in batch) for batch in batches]

  def after(self, state, memory):
    homes = jax.tree.map(lambda x: x.sharding, state)
    if memory is not None:
      homes.opt_state = jax.tree.map(lambda s: s.with_memory_kind(memory), homes.opt_state)
    return homes, self.named(())

  def facts(self, **trees):
    sizes = {name: dict(bytes=states.size_bytes(tree), bytes_per_device=bytes_per_device(tree))
             for name, tree in trees.items() if jax.tree.leaves(tree)}
    return dict(mesh=dict(axes=self.sizes, devices=self.mesh.size, processes=jax.process_count(),
                          kind=jax.devices()[0].device_kind, **sizes))


def bytes_per_device(tree):
  """The most bytes of a tree of arrays that a device of this process holds, counted from its shards."""
  held = collections.Counter()
  for x in jax.tree.leaves(tree):
    for shard in x.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return max(held.values(), default=0)


def say(facts):
  """Prints the facts of a mesh, if there is one; returns them."""
  if facts:
    print(line(facts['mesh']), flush=True)
  return facts


def line(facts):
  """The facts of a Mesh in a paragraph for the terminal.

  >>> print(line(dict(axes=dict(data=4, fsdp=1, sequence=1, model=2), devices=8, processes=1, kind='cpu',
  ...                 parameters=dict(bytes=3000, bytes_per_device=1500))))
  Mesh: data 4 x model 2, 8 devices (cpu) of 1 process.
    parameters       3,000 bytes,        1,500 on a device
  """
  axes = ' x '.join(f'{axis} {n}' for axis, n in facts['axes'].items() if n > 1)
  many = 'process' if facts['processes'] == 1 else 'processes'
  rows = [f'  {name:<10}{part["bytes"]:>12,} bytes, {part["bytes_per_device"]:>12,} on a device'
          for name, part in facts.items() if isinstance(part, dict) and 'bytes' in part]
  first = f'Mesh: {axes}, {facts["devices"]} devices ({facts["kind"]}) of {facts["processes"]} {many}.'
  return '\n'.join([first, *rows])


@functools.cache
def constrained_type(cls, mesh, axes):
  """The subclass of a module class whose outputs are split along `axes`; the other axes are the compiler's choice."""
  sizes = dict(mesh.shape)

  def constrain(y):
    split = sharding.fitted((axes + ((),) * y.ndim)[:y.ndim], y.shape, sizes)
    spec = PartitionSpec(*(entry or PartitionSpec.UNCONSTRAINED for entry in split))
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))

  class Layer(cls):

    def __call__(self, *args, **kwargs):
      return jax.tree.map(constrain, super().__call__(*args, **kwargs))

  Layer.__name__ = Layer.__qualname__ = f'Constrained{cls.__name__}'
  return Layer
