"""The walk: calibration streamed through a model, stage by stage, each solved on what those before it return.

Frantar et al. GPTQ, ICLR 2023, Sec. 4 (https://arxiv.org/abs/2210.17323) does so for the blocks of a transformer:
one block and its inputs are in memory, its inputs have passed the quantized blocks before it, and its layers see
the inputs of the block before any of them is rounded. Here it is done for any NNX model (qat/ptq/stages.py).
"""

import dataclasses
import time
from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import quantized, rules, transform, weights
from qat.ptq import fisher
from qat.ptq import running
from qat.ptq import stages as stages_


@dataclasses.dataclass
class Work:
  """One stage at hand. A method leaves its layers as codes.

  Attributes:
    block: the module that is run, quantized; the method writes to it.
    layers: paths of its sites to solve, relative to it.
    inputs: what it is called with, a list: running.Inputs, or the calibration batches if it is the whole model.
    floats: the same block in floats, and float_inputs what it is called with in the float model.
    apply: (block, one of the inputs) -> what the block returns.
    index: of the stage, a seed for what is drawn at random.
    importance: of each number of what the block returns, one array an input, if the method asks for it; else None.
  """
  block: nnx.Module
  layers: tuple[str, ...]
  inputs: list
  floats: nnx.Module
  float_inputs: list
  apply: Callable
  index: int
  importance: list | None = None


def walk(model, floats, batches, method, apply=None, store=None, watch=None):
  """Solves the weights of a quantized model, stage by stage.

  Args:
    model: what `qat.quantize` returned, calibrated where it must be: its weight quantizers say on which grid.
    floats: the float model that it came from, with the same arrays.
    batches: a list of what `apply` takes.
    method: (Work) -> {layer: {fact: value}}; see qat/ptq/methods.py.
    apply: (model, batch) -> anything; `model(batch)` if not given.
    store: keeps solved stages, so that a walk that was killed goes on: `load(index)` and `save(index, arrays, facts)`.
    watch: called with the number of stages done, as it goes.

  Returns:
    The frozen model, as `qat.freeze` returns it, and {site's path: {fact: value}}, the coverage report.
  """
  batches, apply = list(batches), apply or _call_model
  if not batches:
    raise ValueError('walk was given no batch: solvers measure errors on inputs. Give a list of at least one.')
  model, walker = nnx.clone(model), None
  plan, coverage = stages_.stages(model, apply, batches[0]), {}
  importances = _importances(floats, batches, plan, method)
  for index, stage in enumerate(plan):
    start = time.monotonic()
    if stage.block and walker is None:
      walker = _Chain(model, floats, batches, apply, stage.block, method.reads_floats)
    work = walker.work(stage, index) if stage.block else _whole(model, floats, batches, apply, stage, index)
    work.importance = importances.pop(stage.block or stage.layers[0], None)
    facts = _solve(work, stage, method, store, index)
    coverage |= {_full(stage, layer): dict(about, seconds=(time.monotonic() - start) / max(len(stage.layers), 1))
                 for layer, about in facts.items()}
    if stage.block:
      walker.step(work)
    if watch is not None:
      watch(index + 1)
  transform.settle(model)
  return model, coverage


def _importances(floats, batches, plan, method):
  """{path: importances} of what the block, or the layer, of each stage returns, for methods with a loss."""
  if method.loss is None:
    return {}
  return fisher.importances(floats, batches, method.loss, [stage.block or stage.layers[0] for stage in plan])


def _call_model(model, batch):
  return model(batch)


def _whole(model, floats, batches, apply, stage, index):
  """The Work of a stage that runs the whole model."""
  return Work(model, stage.layers, batches, floats, batches, apply, index)


class _Chain:
  """Goes along the blocks of a chain, with the inputs of the one at hand."""

  def __init__(self, model, floats, batches, apply, first, reads_floats):
    self.model, self.floats, self.reads_floats = model, floats, reads_floats
    self.inputs = running.capture(model, apply, batches, first)
    self.float_inputs = running.capture(floats, apply, batches, first) if reads_floats else []

  def work(self, stage, index):
    find = lambda model: dict(quantized.walk(model))[stage.block]
    layers = tuple(path[len(stage.block) + 1:] for path in stage.layers)
    return Work(find(self.model), layers, self.inputs, find(self.floats), self.float_inputs, running.call, index)

  def step(self, work):
    """On to the next block."""
    _onwards(work.block, self.inputs)
    if self.reads_floats:
      _onwards(work.floats, self.float_inputs)


def _onwards(block, inputs):
  """Puts what `block` is called with next in the place of each of `inputs`: only one batch is held twice."""
  for i, y in enumerate(running.forward(block, inputs)):
    inputs[i] = inputs[i].after(y)


def _full(stage, layer):
  return f'{stage.block}/{layer}' if stage.block else layer


def _solve(work, stage, method, store, index):
  """Leaves codes in the layers of `work`, from the store if it has them; returns the facts."""
  if not work.layers:
    return {}
  kept = None if store is None else store.load(index)
  if kept is not None:
    arrays, facts = kept
    _restore(work, arrays, f'stage {index}, {stage.block or stage.layers[0]}')
    return facts
  facts = method(work)
  for module in _modules(work).values():
    transform.settle_activations(module)
  if store is not None:
    store.save(index, _arrays(work), facts)
  return facts


def _modules(work):
  """The modules whose arrays a solved stage has changed."""
  modules = dict(quantized.walk(work.block))
  return {path: modules.get(path, modules.get(path.rpartition('/')[0])) for path in work.layers}


def _arrays(work):
  """{name: array} of the solved layers, and of the floats left in their block: AWQ moves scales into norms."""
  leaves, _ = _named({path: nnx.state(module) for path, module in _modules(work).items()})
  return {name: np.asarray(x) for name, x in (leaves | _named(_floats_left(work))[0]).items()}


def _floats_left(work):
  """{'floats': the state of the Params of a block of the chain}; those of a whole model stay as they are."""
  return {'floats': nnx.state(work.block, nnx.Param)} if work.apply is running.call else {}


def _named(state):
  leaves, structure = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}, structure


def _restore(work, arrays, place):
  """Puts the arrays of `_arrays` back: into the codes of round to nearest, which have their structure."""
  transform.hold(work.block, nearest(work.block, work.layers))
  for path, module in _modules(work).items():
    transform.settle_activations(module)
    leaves, structure = _named({path: nnx.state(module)})
    if missing := sorted(set(leaves) - set(arrays)):
      raise ValueError(f'What was kept of {place} lacks {missing[:4]}: it is of another model or recipe. '
                       'Begin again in another folder.')
    restored = [jnp.asarray(arrays[name], x.dtype) for name, x in leaves.items()]
    nnx.update(module, jax.tree.unflatten(structure, restored)[path])
  leaves, structure = _named(_floats_left(work))
  restored = [jnp.asarray(arrays.get(name, x), x.dtype) for name, x in leaves.items()]
  nnx.update(work.block, jax.tree.unflatten(structure, restored).get('floats', {}))


def nearest(block, layers):
  """{path: QArray} of the sites of `layers`, as their own quantizers round them."""
  found = {site.path: site for site in rules.sites(block) if site.path in layers}
  weight = lambda site: vars(quantized.of(site.module).weights)[site.name]
  return {path: weights.freeze(weight(site), site.variable).get_value() for path, site in found.items()}
