"""Runs a block on its batches, compiled once for all blocks of one structure."""

import dataclasses
import functools

from flax import nnx
import jax

from qat.nn import quantized
from qat.ptq import taps


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

  return [Inputs(inputs_of(state, batch), rest[0]) for batch in batches]


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
