"""Reconstruction: train what a block's quantizers learn until the block gives what it gave in floats.

One loop for AdaRound (Nagel et al. 2020, https://arxiv.org/abs/2004.10568), BRECQ (Li et al. 2021,
https://arxiv.org/abs/2102.05426), QDrop, FlexRound, SignRound, OmniQuant's clipping, TesseraQ and EfficientQAT's
Block-AP: they differ in the quantizers, in which variables move and how (ptq/presets.py), and in what counts as a
block: a layer, a residual block, a layer of a transformer, or a whole network.

Whatever the method, the loss that is reported is that of the hard, served codes over all examples, and the
variables with the least of it are kept: the result is never worse than the start.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qat.nn import quantized, rules, transform
from qat.quantizers import adaround, qdrop


def constant(progress):
  return jnp.ones_like(progress)


def linear(progress):
  """To 0."""
  return 1 - progress


def cosine(progress):
  """To 0."""
  return 0.5 * (1 + jnp.cos(jnp.pi * progress))


@dataclasses.dataclass(frozen=True)
class Group:
  """Variables that move together. Of several groups, a variable is in the first that has it.

  Attributes:
    what: a class of variables, such as base.Rounding, or a regular expression for whole paths in the block.
    rate: the learning rate at the start, or a function of the number of steps that gives it.
    optimizer: schedule -> optax.GradientTransformation.
    decay: a function of progress in [0, 1], by which the rate is multiplied.
  """
  what: type[nnx.Variable] | str
  rate: float | Callable[[int], float]
  optimizer: Callable = optax.adam
  decay: Callable = constant

  def has(self, path, variable):
    if isinstance(self.what, str):
      return isinstance(variable, nnx.Param) and re.fullmatch(self.what, _name(path)) is not None
    return isinstance(variable, self.what)

  def transformation(self, steps):
    rate = self.rate(steps) if callable(self.rate) else self.rate
    return self.optimizer(lambda count: rate * self.decay(jnp.float32(count) / steps))


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a block is trained. A value: equal settings share a compiled program.

  Attributes:
    groups: what is trained; all else stays.
    steps: how many.
    batch_size: examples a step, drawn without replacement in each pass over them.
    checks: how often, evenly spread over the steps, the hard loss over all examples is taken.
    hardened: None, or the share of all roundings that is fixed after a share of the checks, 0 to 1.
  """
  groups: tuple[Group, ...]
  steps: int
  batch_size: int
  checks: int = 5
  hardened: Callable[[float], float] | None = None

  def __post_init__(self):
    for field in ('steps', 'batch_size', 'checks'):
      if getattr(self, field) < 1:
        raise ValueError(f'Settings.{field} {getattr(self, field)}: it counts something there must be one of. '
                         'Give 1 or more.')


@dataclasses.dataclass(frozen=True)
class Report:
  """What a reconstruction did. Losses are mean squared errors of the served codes over all examples.

  Attributes:
    before, after: the loss at the start and of what is returned.
    best_step: the step at which that was found; 0 if nothing was better than the start.
    seconds: with compilation.
    history: (step, loss) of every check.
  """
  before: float
  after: float
  best_step: int
  seconds: float
  history: tuple


def reconstruct(block, apply, inputs, targets, settings, key, importance=None):
  """Trains the quantizers of `block` on its own outputs.

  Args:
    block: a module with quantizers (qat.quantize); it stays as it is. Its mode, train or eval, is the caller's.
    apply: (block, inputs) -> float[b, ...]. Give the same function for all blocks: it is part of what is compiled.
    inputs: a pytree of [n, ...], what `apply` takes; a batch of it is [b, ...].
    targets: float[n, ...], what `apply` should give: the outputs of the float block.
    settings: a value of ptq/presets.py.
    key: jax.Array, a random key, from which batches and dropping are drawn. The same key gives the same bits.
    importance: float of the targets' shape, by which their squared errors are weighted (see ptq/fisher.py), or None.

  Returns:
    The block with its quantizers in their hard form, and a Report.
  """
  began = time.monotonic()
  data = _Data(inputs, targets, importance)
  _check(data)
  key, reseeding = jax.random.split(key)
  program, learned, rest = _take_apart(_relaxed(block, reseeding), apply, settings)
  loss = lambda learned: float(_evaluate(program, learned, rest, data))
  before = loss(learned)
  if not np.isfinite(before):
    raise ValueError(f'reconstruct: the error of the block at the start is {before}. Look for numbers that are not '
                     'finite in the inputs, the targets and the weights.')
  best, best_step, history = learned, 0, [(0, before)]
  carry = (learned, program.start(learned), rest)
  ends = [round(settings.steps * (i + 1) / settings.checks) for i in range(settings.checks)]
  for start, end in zip([0, *ends], ends):
    carry = _train(program, carry, data, key, jnp.int32(start), jnp.int32(end))
    if settings.hardened is not None:
      carry = (_harden(program, carry[0], rest, settings.hardened(end / settings.steps)), *carry[1:])
    history.append((end, loss(carry[0])))
    if history[-1][1] < min(h for _, h in history[:-1]):
      best, best_step = carry[0], end
  result = program.join(best, rest)
  each_quantizer(result, lambda q: q.settled())
  return result, Report(before, dict(history)[best_step], best_step, time.monotonic() - began, tuple(history))


def starting_at(block, codes):
  """A copy of `block` whose weights' quantizers start from codes, such as GPTQ's, and learn from there.

  Args:
    block: a module with quantizers that have a `starting_at(w, q)`: AdaRound, SignRound.
    codes: {path of a layer or Param in the block: QArray[*lead, in, out]}; the other weights keep theirs.
  """
  block = nnx.clone(block)
  weights = {s.path: (quantized.of(s.module).weights[s.name], s) for s in rules.sites(block)
             if s.name and quantized.of(s.module) is not None and s.name in vars(quantized.of(s.module).weights)}
  for path, q in codes.items():
    if path not in weights:
      raise ValueError(f"starting_at: there are codes for '{path}', and the block's quantized weights are "
                       f'{sorted(weights)}. Give the codes under these paths.')
    weight, site = weights[path]
    weight.quantizer = weight.quantizer.starting_at(weight.layout.to_matrix(site.variable.get_value()), q)
  return block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Data:
  """Examples, along the first axis of every leaf."""
  inputs: object
  targets: jax.Array
  importance: jax.Array | None

  def __len__(self):
    return self.targets.shape[0]

  def rows(self, rows):
    return jax.tree.map(lambda a: jnp.asarray(a)[rows], self)


@dataclasses.dataclass(frozen=True)
class _Program:
  """All that is compiled for: blocks of one structure share it."""
  graph: nnx.GraphDef
  apply: Callable
  settings: Settings

  def join(self, learned, rest):
    return nnx.merge(self.graph, *learned, rest, copy=True)

  def take_apart(self, block):
    """(one State a group, the rest)."""
    *learned, rest = nnx.split(block, *(g.has for g in self.settings.groups), ...)[1:]
    return tuple(learned), rest

  @property
  def transformations(self):
    return [g.transformation(self.settings.steps) for g in self.settings.groups]

  def start(self, learned):
    """The state of the optimizers."""
    return tuple(t.init(state) for t, state in zip(self.transformations, learned))

  def errors(self, block, data):
    """Each example's sum of squared errors: f32[b]."""
    outputs = self.apply(block, data.inputs)
    if outputs.shape != data.targets.shape:
      raise ValueError(f'reconstruct: apply gives {outputs.shape} for a batch of targets {data.targets.shape}. '
                       'Give targets of the shape of its outputs.')
    error = outputs.astype(jnp.float32) - data.targets.astype(jnp.float32)
    squares = error * error if data.importance is None else error * error * data.importance
    return squares.reshape(len(data), -1).sum(-1)


def each_quantizer(block, f):
  """Puts f(quantizer) in the place of each quantizer of `block`, once, in the order of the layers."""
  seen = {}  # id of a Weight that layers share.
  for layer in quantized.layers(block).values():
    q = vars(layer)['quantizers']
    for weight in q.weights.values():
      if weight.quantizer is not None and id(weight) not in seen:
        seen[id(weight)] = weight.quantizer = f(weight.quantizer)
    for holder, slot in transform.activations(q):
      setattr(holder, slot, f(getattr(holder, slot)))


def quantizers(block):
  """Each quantizer of `block`, once, in the order of the layers."""
  found = []
  each_quantizer(block, lambda q: found.append(q) or q)
  return found


def _relaxed(block, key):
  """A copy of `block` in which the quantizers are in the form that is trained."""
  block = nnx.clone(block)
  each_quantizer(block, lambda q: q.relaxed())
  for i, q in enumerate(quantizers(block)):
    if isinstance(q, qdrop.Dropping):
      q.reseed(jax.random.fold_in(key, i))
  return block


def _take_apart(block, apply, settings):
  """(_Program, learned, rest) of a relaxed block."""
  program = _Program(nnx.split(block, *(g.has for g in settings.groups), ...)[0], apply, settings)
  learned, rest = program.take_apart(block)
  found = [bool(jax.tree.leaves(state)) for state in learned]
  unused = [g.what for g, any_there in zip(settings.groups, found) if isinstance(g.what, str) and not any_there]
  if unused or not any(found):
    params = nnx.to_flat_state(nnx.state(block, nnx.Param))
    there = [f'{_name(path)} ({type(v).__name__})' for path, v in params]
    asked = unused or [getattr(g.what, '__name__', g.what) for g in settings.groups]
    raise ValueError(f'reconstruct: nothing is left to train for the groups {asked}. The block has {there}. '
                     'Quantize it with a quantizer that learns, or name what it has.')
  return program, learned, rest


@functools.partial(jax.jit, static_argnums=0)
def _train(program, carry, data, key, start, end):
  """The steps from `start` to `end`: carry = (learned, optimizers' states, rest), which is returned moved."""
  settings, n = program.settings, len(data)
  size = min(settings.batch_size, n)
  batches = n // size

  def loss(learned, rest, batch, progress):
    block = program.join(learned, rest)
    # Summed over the last axis, as in AdaRound: its regularizer's weight is for that.
    loss = program.errors(block, batch).sum() * (data.targets.shape[-1] / batch.targets.size)
    loss = loss + sum(q.penalty(progress) for q in quantizers(block))
    return loss, program.take_apart(block)[1]

  def step(t, carry):
    learned, states, rest = carry
    order = jax.random.permutation(jax.random.fold_in(key, t // batches), n)
    batch = data.rows(jax.lax.dynamic_slice_in_dim(order, (t % batches) * size, size))
    gradients, rest = jax.grad(loss, has_aux=True)(learned, rest, batch, jnp.float32(t) / settings.steps)
    with jax.numpy_dtype_promotion('standard'):  # optax's Adam raises a float to an integer.
      moved = [t.update(g, s, p) for t, g, s, p in zip(program.transformations, gradients, states, learned)]
    learned = tuple(optax.apply_updates(p, u) for p, (u, _) in zip(learned, moved))
    return learned, tuple(s for _, s in moved), rest

  return jax.lax.fori_loop(start, end, step, carry)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(program, learned, rest, data):
  """The mean squared error of the hard form over all examples: f32[]."""
  n = len(data)
  size = min(program.settings.batch_size, n)
  block = program.join(learned, rest)
  each_quantizer(block, lambda q: q.settled())
  graph, state = nnx.split(block)

  def add(i, total):
    first = jnp.minimum(i * size, n - size)  # The last batch reaches back; what was seen does not count again.
    rows = first + jnp.arange(size)
    errors = program.errors(nnx.merge(graph, state, copy=True), data.rows(rows))
    return total + jnp.sum(jnp.where(rows >= i * size, errors, jnp.zeros_like(errors)))

  return jax.lax.fori_loop(0, -(-n // size), add, jnp.float32(0)) / data.targets.size


@functools.partial(jax.jit, static_argnums=0)
def _harden(program, learned, rest, share):
  """`learned`, with a share of all roundings fixed."""
  block = program.join(learned, rest)
  for q in quantizers(block):
    if isinstance(q, adaround.SoftAdaRound):
      q.harden(share)
  return program.take_apart(block)[0]


def _check(data):
  """Raises unless all leaves have as many examples."""
  counts = {str(jnp.shape(a)[:1]) for a in jax.tree.leaves(data)}
  if len(counts) != 1 or not len(data):
    shapes = jax.tree.map(jnp.shape, (data.inputs, data.targets, data.importance))
    raise ValueError(f'reconstruct: inputs, targets and importance of shapes {shapes} have {sorted(counts)} examples. '
                     'Give as many of each, along the first axis, and one at least.')
  if data.importance is not None and data.importance.shape != data.targets.shape:
    raise ValueError(f'reconstruct: importance has the shape {data.importance.shape} and the targets '
                     f'{data.targets.shape}. It weighs each number of them: give one of their shape.')


def _name(path):
  """'ffn/up/kernel' of a path."""
  return '/'.join(str(p) for p in path)
