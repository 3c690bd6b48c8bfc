"""Runs a block on its batches, compiled once for all blocks of one structure."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from qat.nn import quantized
from qat.ptq import moments, taps


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a module is called with: arrays, and what is no array (flags, None), which is the same for all batches."""
  arrays: tuple
  rest: tuple      # (structure, ((position, value), ...)), hashable

  @classmethod
  def of(cls, args, kwargs):
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
    arrays = tuple(x for x in leaves if hasattr(x, 'dtype'))
    return cls(arrays, (structure, tuple((i, x) for i, x in enumerate(leaves) if not hasattr(x, 'dtype'))))

  def arguments(self):
    """(args, kwargs)."""
    structure, fixed = self.rest
    arrays, fixed = iter(self.arrays), dict(fixed)
    leaves = [fixed[i] if i in fixed else next(arrays) for i in range(structure.num_leaves)]
    return jax.tree.unflatten(structure, leaves)

  def after(self, y):
    """The inputs of the next block of a chain, which is called on what this one returned."""
    y = jax.tree.leaves(y)
    return dataclasses.replace(self, arrays=(*y, *self.arrays[len(y):]))


jax.tree_util.register_dataclass(Inputs, ['arrays'], ['rest'])


def call(module, inputs):
  """module(*args, **kwargs) of an Inputs."""
  args, kwargs = inputs.arguments()
  return module(*args, **kwargs)


class Reached(Exception):
  """Ends a trace where the wanted module is called."""


def capture(model, apply, batches, path):
  """The Inputs that the module at `path` is called with for each batch, without running what comes after it."""
  door = _door(model, apply, path)
  return [door(batch) for batch in batches]


@dataclasses.dataclass(frozen=True)
class Rows:
  """float[b, t, v] that a model returns, made at the positions that are asked for: rows[0, 3:5] is float[2, v].

  Attributes:
    rest: (batch, what the last block of its chain returns) -> what the model returns.
    batch: what the model is given, arrays [b, t, ...].
    last: f32[b, t, width], what the last block returns.
  """
  rest: Callable
  batch: Any
  last: jax.Array

  @property
  def shape(self):
    return jax.eval_shape(self.rest, self.batch, self.last).shape

  def __getitem__(self, index):
    sequence, positions = index
    return self.rest(*jax.tree.map(lambda a: a[sequence:sequence + 1, positions], (self.batch, self.last)))[0]


def streamed(model, apply, blocks):
  """batch -> the Rows of apply(model, batch), in evaluation mode, one block of a chain after the other.

  One XLA program of the whole network decodes the codes of all its layers before the first product: here those of one
  block are in floats at a time, and blocks of one structure are compiled once. Logits of a large vocabulary are never
  whole, for which what comes after the chain must treat each position by itself, as a decoder's norm and head do.

  Args:
    model: any; it is not to be changed as long as the function is used.
    apply: (model, batch) -> float[b, t, v], of a batch of arrays [b, t, ...].
    blocks: paths of all blocks of its chain (stages.chain), in order.
  """
  door, modules, rest = _door(model, apply, blocks[0]), dict(quantized.walk(model)), _rest(model, apply, blocks)

  def run(batch):
    inputs = door(batch)
    for path in blocks:
      y, = forward(modules[path], [inputs])
      inputs = inputs.after(y)
    return Rows(rest, batch, y)

  return run


def _rest(model, apply, blocks):
  """(batch, what the last of the blocks returns) -> what comes of it."""
  skipped, given = nnx.clone(model), []
  modules = dict(quantized.walk(skipped))
  for path in blocks:
    module = modules[path]

    class Skipped(type(module)):

      def __call__(self, x, *args, **kwargs):
        return given[-1]

    module.__class__ = Skipped
  graph, state = _evaluated(skipped)

  @jax.jit
  def rest(state, batch, y):
    given.append(y)
    try:
      return apply(nnx.merge(graph, state), batch)
    finally:
      given.clear()

  return functools.partial(rest, state)


def _door(model, apply, path):
  """batch -> the Inputs of the module at `path`."""
  watched, rest = nnx.clone(model), []
  module = dict(quantized.walk(watched))[path]

  class Watched(type(module)):

    def __call__(self, *args, **kwargs):
      raise Reached(Inputs.of(args, kwargs))

  module.__class__ = Watched
  graph, state = _evaluated(watched)

  @jax.jit
  def inputs_of(state, batch):
    try:
      apply(nnx.merge(graph, state), batch)
    except Reached as reached:
      inputs, = reached.args
      rest.append(inputs.rest)
      return inputs.arrays
    raise AssertionError(f'{path} was called when the model was traced, and now is not.')

  return lambda batch: Inputs(inputs_of(state, batch), rest[0])


def forward(block, inputs, apply=call):
  """Yields what `block` returns, in evaluation mode, for each of `inputs`.

  Args:
    block: a module.
    inputs: Inputs; or batches, if `apply`, (module, batch) -> anything, is given.
  """
  graph, state = _evaluated(block)
  for one in inputs:
    yield _run(apply, graph, state, one)


def gather(block, inputs, layers, apply=call):
  """{path: Moments} of what the layers of `block` read while it runs on `inputs`."""
  tapped = nnx.clone(block)
  taps.insert(tapped, layers)
  graph, state = _evaluated(tapped)
  gathered, others = nnx.split_state(state, taps.Gathered, ...)
  for one in inputs:
    gathered = _gather(apply, graph, gathered, others, one)
  return taps.moments(nnx.merge(graph, gathered, others), layers)


def gather_pairs(block, floats, inputs, float_inputs, layers, apply=call):
  """{path: moments.Drifted} of what the layers of `block` read, and those of `floats` on `float_inputs`."""
  gathered = gather(block, inputs, layers, apply)
  sides = []
  for model in (block, floats):
    tapped = nnx.clone(model)
    taps.insert(tapped, layers, moments.Rows.zeros)
    sides.append(_evaluated(tapped))
  graphs, states = zip(*sides)
  cross = {path: jnp.zeros_like(found.second) for path, found in gathered.items()}
  for pair in zip(inputs, float_inputs):
    cross = _cross(apply, graphs, layers, cross, states, pair)
  fields = lambda m: {f.name: getattr(m, f.name) for f in dataclasses.fields(m)}
  return {path: moments.Drifted(**fields(found), cross=cross[path]) for path, found in gathered.items()}


def _evaluated(block):
  block = nnx.clone(block)
  block.eval()
  return nnx.split(block)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(apply, graph, state, one):
  return apply(nnx.merge(graph, state), one)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _gather(apply, graph, gathered, others, one):
  module = nnx.merge(graph, gathered, others)
  apply(module, one)
  return nnx.state(module, taps.Gathered)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _cross(apply, graphs, layers, cross, states, pair):
  """`cross`, and the sums of x~^T x of one batch: `pair` is what the block is called with, and the float block."""
  found = []
  for graph, state, one in zip(graphs, states, pair):
    module = nnx.merge(graph, state)
    apply(module, one)
    found.append(taps.moments(module, layers))
  product = functools.partial(jnp.einsum, '...nk,...nl->...kl', precision='highest')
  return {path: cross[path] + product(found[0][path].rows, found[1][path].rows) for path in cross}
