"""Methods: how the layers of one stage of the walk are solved: (Work) -> {layer: facts}."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat.core import qarray, ranges
from qat.nn import calls, quantized, rules, transform, weights
from qat.ptq import awq, fisher, links as links_, reconstruct, running, stages, taps, walk
from qat.quantizers import lsq, qdrop, static


@dataclasses.dataclass(frozen=True)
class Layerwise:
  """Each layer by itself, from the Moments of its inputs.

  Attributes:
    solver: (w: f32[i, o], Moments, spec) -> (QArray[i, o], facts); see qat/ptq/solvers.py.
    sequential: whether the layers of a block are solved in waves (stages.waves), each on the inputs that the codes of
      the waves before it give, as GPTQ's authors do ("true sequential"); else all on those of the block in floats.
  """
  solver: Callable
  sequential: bool = False

  reads_floats, loss = False, None

  def __call__(self, work):
    solved, facts = self.solve(work)
    transform.hold(work.block, solved)
    return facts

  def solve(self, work):
    """{layer: QArray[*lead, i, o]} and {layer: facts}; `work` stays as it is."""
    waves = [work.layers]
    if self.sequential:
      waves = stages.waves(work.block, work.apply, work.inputs[0], work.layers)
    work, found = dataclasses.replace(work, block=nnx.clone(work.block)), {}
    for i, wave in enumerate(waves):
      gathered = self.gather(work, wave)
      near, sites = walk.nearest(work.block, wave), {s.path: s for s in rules.sites(work.block)}
      solved = {path: self._site(sites[path], gathered.get(path), near[path]) for path in wave}
      if i + 1 < len(waves):
        transform.hold(work.block, {path: q for path, (q, _) in solved.items()})
      found |= solved
    return {path: found[path][0] for path in work.layers}, {path: found[path][1] for path in work.layers}

  def gather(self, work, layers):
    """{path: Moments} of what `layers` read."""
    return running.gather(_in_floats(work.block, work.layers), work.inputs, layers, work.apply)

  def _site(self, site, moments, near):
    """(QArray[*lead, i, o], facts) of one site; `near` is its weight rounded to nearest."""
    why = taps.tappable(site) or (_unseen(moments, near) if moments is not None else 'no input was seen')
    if why:
      return near, dict(fallback=f'rounded to nearest: {why}')
    weight = vars(quantized.of(site.module).weights)[site.name]
    w = weight.quantizer.prepare(weight.layout.to_matrix(site.variable.get_value())).astype(jnp.float32)
    lead = lambda a, rank: a.reshape(*w.shape[:-2], *a.shape[a.ndim - rank:])
    moments = jax.tree.map(lead, moments, moments.ranks())
    solved, facts = [], {}
    for index in np.ndindex(*w.shape[:-2]) if w.ndim > 2 else [()]:
      one = jax.tree.map(lambda a: a[index], moments)
      q, notes = self.solver(w[index], one, weight.quantizer.spec)
      solved.append(q)
      facts = notes | {k: v for k, v in facts.items() if k == 'fallback'} | measure(w[index], q, one, facts)
    stack = lambda *a: jnp.stack(a).reshape(*w.shape[:-2], *a[0].shape)
    return jax.tree.map(stack, *solved) if w.ndim > 2 else solved[0], facts


@dataclasses.dataclass(frozen=True)
class Drifted(Layerwise):
  """Each layer by itself, from what it reads in the quantized model and in the float one: moments.Drifted."""

  reads_floats = True

  def gather(self, work, layers):
    block = _in_floats(work.block, work.layers)
    return running.gather_pairs(block, work.floats, work.inputs, work.float_inputs, layers, work.apply)


def _in_floats(block, layers):
  """A copy of `block` whose weights are floats, but for those that are codes already; inputs stay on their grids."""
  block = nnx.clone(block)
  for site in rules.sites(block):
    if site.path in layers and not isinstance(site.variable, weights.Codes):
      del quantized.of(site.module).weights[site.name]
  return block


def _unseen(moments, near):
  """Why Moments cannot serve: a convolution of many groups has some for each, and its matrix is one."""
  if moments.second.ndim > near.ndim and moments.second.shape[0] > 1:
    return f'a convolution of {moments.second.shape[0]} groups'
  return '' if jnp.all(moments.count > 0) else 'no calibration batch reached it'


def measure(w, q, moments, before):
  """Facts of one solved matrix, added up over those before it: rows seen, dead inputs, the relative output error."""
  error, dead = _measure(w, q, moments)
  return dict(rows=int(moments.count), dead=before.get('dead', 0) + int(dead),
              error=max(before.get('error', 0.0), float(error)))


@jax.jit
def _measure(w, q, moments):
  """tr(dW^T H dW) / tr(W^T H W), and the number of inputs that were always 0."""
  H, wrong = moments.H, w - qarray.decode(q)
  energy = lambda a: jnp.sum(a * (H @ a))
  return energy(wrong) / jnp.maximum(energy(w), jnp.finfo(jnp.float32).tiny), jnp.sum(moments.largest == 0)


@dataclasses.dataclass(frozen=True)
class Scaled:
  """AWQ (qat/ptq/awq.py): scales move between the layers of a block, which are then solved.

  Attributes:
    then: a Layerwise, which solves them.
    patterns: Links that tracing cannot see; those whose source the block has are used.
    rule: the range rule under which the scales are searched.
  """
  then: Layerwise
  patterns: tuple = ()
  rule: Callable = ranges.absmax

  reads_floats, loss = False, None

  def __call__(self, work):
    if work.apply is running.call:  # A layer that is solved by itself has no block for scales to move in.
      nnx.update(work.block, nnx.state(self._scaled(work), nnx.Param))
    return self.then(work)

  def _scaled(self, work):
    """The float block, with its scales moved."""
    args, kwargs = work.inputs[0].arguments()
    found = links_.find(work.floats, *args, **kwargs)
    paths = [path for path, _ in quantized.walk(work.floats)]
    patterns = [p for p in self.patterns if any(re.fullmatch(p.source, path) for path in paths)]
    if patterns:
      found += links_.resolve(work.floats, patterns, *args, **kwargs)
    targets = {path for link in found for path in link.targets}
    specs = [spec for path, spec in _specs(work).items() if path in targets]
    found = [link for link in found if set(link.targets) <= set(_specs(work))]
    if not found:
      return work.floats
    gathered = running.gather(work.floats, work.inputs, tuple(sorted(targets)), work.apply)
    return awq.awq(work.floats, gathered, found, specs[0], self.rule)[0]


def _specs(work):
  """{layer: the grid of its weight}."""
  weight = lambda site: vars(quantized.of(site.module).weights)[site.name]
  return {s.path: weight(s).quantizer.spec for s in rules.sites(work.block) if s.path in work.layers}


@dataclasses.dataclass(frozen=True)
class Blockwise:
  """What the quantizers of a block learn is trained until the block gives what it gives in floats.

  Attributes:
    quantizer: spec -> the quantizer of a weight, such as adaround.AdaRound.
    settings: a value of qat/ptq/presets.py.
    start: a Layerwise, from whose codes they start; None: from what the quantizers start with.
    inputs: (quantizer of an input, the layer's lead) -> the one that learns in its place; None leaves them as they are.
    loss: (model, batch) -> f32[], the task's, by whose gradients in the float model errors are weighed; None: alike.
    float_targets: whether targets are what the block gives in the float model, as in AdaRound (Sec. 3.3), or what it
      gives in floats on the inputs that the quantized model has for it.
    seed: of the batches.
  """
  quantizer: Callable
  settings: reconstruct.Settings
  start: Layerwise | None = None
  inputs: Callable | None = None
  loss: Callable | None = None
  float_targets: bool = True
  seed: int = 0

  @property
  def reads_floats(self):
    return self.float_targets

  def __call__(self, work):
    if (layer := _alone(work)) is not None:
      return dict(zip(work.layers, self(layer).values()))
    solved, facts = self.start.solve(work) if self.start else ({}, {path: {} for path in work.layers})
    block = self._learning(work.block, work.layers, solved)
    block.eval()
    inputs = work.float_inputs if self.float_targets else work.inputs
    targets = _together(list(running.forward(work.floats, inputs, work.apply)))
    key = jax.random.fold_in(jax.random.key(self.seed), work.index)
    importance = None if work.importance is None else fisher.scaled(work.importance)
    block, report = reconstruct.reconstruct(block, work.apply, _together(work.inputs), targets,
                                            _of_layers(self.settings, block, work.layers), key, importance)
    transform.hold(work.block, walk.nearest(block, work.layers))
    self._inputs(work.block, block)
    about = dict(before=report.before, after=report.after, best_step=report.best_step)
    return {path: facts[path] | about for path in work.layers}

  def _learning(self, block, layers, solved):
    """A copy of `block` whose weights have the quantizers that learn, starting at the codes `solved`, if any."""
    block = nnx.clone(block)
    for site in rules.sites(block):
      if site.path in layers:
        weight = vars(quantized.of(site.module).weights)[site.name]
        w = weight.layout.to_matrix(site.variable.get_value())
        weight.quantizer = self.quantizer(weight.quantizer.spec).for_weight(w)
    if self.inputs is not None:
      self._learn_inputs(block, layers)
    return reconstruct.starting_at(block, solved) if solved else block

  def _learn_inputs(self, block, layers):
    """Puts `self.inputs` in the place of the quantizers of the inputs of `layers`, in place."""
    found = [quantized.of(site.module) for site in rules.sites(block) if site.path in layers]
    found = [q for q in found if q.input is not None]
    if not found:
      raise ValueError(f'The inputs of {list(layers)} are floats: there is nothing to learn of them. Give a recipe '
                       "that quantizes inputs, such as 'w4a4_static', or a method for weights alone.")
    for q in found:
      q.input = self.inputs(q.input, q.lead)

  def _inputs(self, block, trained):
    """Puts the trained quantizers of activations into `block`."""
    for mine, other in zip(*(quantized.layers(b).values() for b in (block, trained))):
      pairs = zip(*(transform.activations(vars(layer)['quantizers']) for layer in (mine, other)))
      for (holder, slot), (theirs, _) in pairs:
        setattr(holder, slot, getattr(theirs, slot))


def dropped(probability, quantizer, lead):
  """QDrop of an input's quantizer; one of a calibrated scale learns it from there, by LSQ."""
  if isinstance(quantizer, static.Static) and quantizer.zero is None:
    quantizer = lsq.LSQ(quantizer.spec).for_input(lead, quantizer.scale.get_value())
  new = qdrop.QDrop(quantizer, probability)
  new.lead = lead
  return new


def _of_layers(settings, block, layers):
  """`settings`, whose groups of all Params are of the weights of `layers`: no others are kept as codes."""
  names = [re.escape(f'{site.path}/{site.name}' if site.kind != 'Param' else site.path)
           for site in rules.sites(block) if site.path in layers]
  chosen = lambda group: dataclasses.replace(group, what='|'.join(names)) if group.what is nnx.Param else group
  return dataclasses.replace(settings, groups=tuple(map(chosen, settings.groups)))


class _Alone(nnx.Module):
  """A block of one layer."""

  def __init__(self, layer):
    self.layer = layer

  def __call__(self, *args, **kwargs):
    return self.layer(*args, **kwargs)


def _alone(work):
  """The Work of a layer outside the chain on what the layer itself is called with, where that is once; else None."""
  if work.apply is running.call:
    return None
  path, = work.layers
  if [call.path for call in calls.trace(work.block, work.apply, work.inputs[0])].count(path) != 1:
    return None
  block, floats = (_Alone(dict(quantized.walk(model))[path]) for model in (work.block, work.floats))
  inputs, float_inputs = (running.capture(model, work.apply, work.inputs, path) for model in (work.block, work.floats))
  return walk.Work(block, ('layer',), inputs, floats, float_inputs, running.call, work.index, work.importance)


def _together(batches):
  """A list of pytrees of [b, ...] -> one of [n, ...]."""
  return jax.tree.map(lambda *a: jnp.concatenate(a), *batches)
