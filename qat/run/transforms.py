"""Transforms: what `qat ptq` does to the float network before it is quantized, and to the codes afterwards.

    config.transforms = (dict(name='smooth', alpha=0.5), dict(name='bias_correction'), ...)

Those of BEFORE leave the network's function as it is, and are made in their order; so are then those of AFTER.
"""

import dataclasses
import functools
import inspect
import re

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import hadamard
from qat.nn import calls
from qat.nn import layouts
from qat.nn import quantized
from qat.nn import rules
from qat.nn import transform
from qat.ptq import bias_correction as corrections
from qat.ptq import end_to_end
from qat.ptq import equalize as equalization
from qat.ptq import incoherence as incoherences
from qat.ptq import let as lets
from qat.ptq import links
from qat.ptq import rotate as rotations
from qat.ptq import running
from qat.ptq import smooth as smoothing
from qat.ptq import spin as spins
from qat.ptq import stages
from qat.quantizers.ste import STE
from qat.run import names
from qat.run import tasks


def smooth(model, task, recipe, alpha=0.5):
  """SmoothQuant, through the norms, and what links the task names."""
  found = linked(model, task)
  if not found:
    raise ValueError("transform 'smooth': no norm of this network is read by linear layers alone, so none can take up "
                     "a factor. Use 'smooth_inputs', which divides at the layers' doors.")
  targets = [path for link in found for path in link.targets]
  return smoothing.smooth(model, smoothing.largest(model, targets, task.batches, tasks.call), found, alpha)


def smooth_inputs(model, task, recipe, layers='.*', alpha=0.5):
  """SmoothQuant at the door of each Linear layer whose path matches `layers`, which then divides its input itself."""
  paths = [path for path, m in quantized.walk(model) if isinstance(m, nnx.Linear) and re.fullmatch(layers, path)]
  if not paths:
    raise ValueError(f"transform 'smooth_inputs': no Linear layer matches {layers!r}. Write a regular expression for "
                     'whole paths.')
  return smoothing.smooth_inputs(model, smoothing.largest(model, paths, task.batches, tasks.call), paths, alpha)


def rotate(model, task, recipe, seed=0, online=True):
  """QuaRot: random Hadamard rotations of the residual stream and of the values' heads, folded into a decoder's weights.

  `online` also turns queries and keys after RoPE, and what the last layer of each ffn reads, while the model runs.
  """
  model, stream, heads = _rotatable(model, task)
  r1, r2 = _random_rotations(model, seed)
  return _rotated(model, stream, heads, r1, {link: r2 for link in heads}, online)


def spin(model, task, recipe, steps=100, rate=1.5, seed=0, online=True):
  """SpinQuant: as `rotate`, with rotations learned on the task's loss, a sequence a step, from random Hadamard ones.

  Each layer's values have a rotation of their own. Grids with a zero count as floats in the loss.
  """
  if task.loss is None:
    raise ValueError("transform 'spin' learns rotations on the task's loss, and this task names none. Use 'rotate'.")
  model, stream, heads = _rotatable(model, task)
  r1, r2 = _random_rotations(model, seed)
  relaxed = [dataclasses.replace(rule, weight=_ranged(rule.weight), input=_ranged(rule.input)) for rule in recipe]

  def loss(turns, model, batch):
    rotated = _rotated(model, stream, heads, turns[0], dict(zip(heads, turns[1])), online)
    return task.loss(transform.quantize(rotated, relaxed), batch)

  examples = task.examples()
  batches = [examples[i % len(examples)] for i in range(steps)]
  (r1, r2), _ = spins.learn(loss, (r1, [r2] * len(heads)), model, batches, rate)
  return _rotated(model, stream, heads, r1, dict(zip(heads, r2)), online)


def _rotatable(model, task):
  """A decoder whose norms have no gains, its Stream, and the links of its heads."""
  config, args = model.config, task.batches[0]
  stream = rotations.resolve(model, rotations.TIED_DECODER if config.tied_head else rotations.DECODER, *args)
  heads = links.resolve(model, links.heads(config.head_dim), *args)
  return *rotations.fold_norms(model, stream), heads


def _random_rotations(model, seed):
  """Of the stream, and of a head."""
  keys = jax.random.split(jax.random.key(seed))
  return hadamard.randomized(keys[0], model.config.width), hadamard.randomized(keys[1], model.config.head_dim)


def _rotated(model, stream, heads, r1, r2, online):
  model = rotations.rotate_heads(rotations.rotate_stream(model, stream, r1), heads, r2)
  return rotations.rotate_inputs(rotations.rotate_scores(model)) if online else model


def _ranged(quantizer):
  """A quantizer whose range hands gradients on; None where the grid has none to learn by."""
  if quantizer is None or quantizer.spec.zero is not None or quantizer.spec.block is None:
    return None
  return spins.Ranged(quantizer.spec)


def let(model, task, recipe, epochs=20, rate=5e-3):
  """OmniQuant's learned scales and shifts, block by block, on what the blocks before it give in floats."""
  found = stages.chain(calls.trace(model, tasks.call, task.batches[0]), model)
  if not found:
    raise ValueError("transform 'let' learns block by block, and this network is no chain of blocks. Use 'smooth'.")
  model = nnx.clone(model)
  inputs = running.capture(model, tasks.call, task.batches, found[0])
  for path in found:
    block = dict(quantized.walk(model))[path]
    args, kwargs = inputs[0].arguments()
    inside, own = links.find(block, *args, **kwargs), _of_block(recipe, model, path)
    if inside and own:
      block.eval()
      scaled, _ = lets.learn(block, inside, inputs, lambda b, own=own: transform.quantize(b, own), epochs=epochs,
                             lr=rate, apply=running.call)
      nnx.update(block, nnx.state(scaled, nnx.Param))
    inputs = [one.after(y) for one, y in zip(inputs, running.forward(block, inputs))]
  return model


def _of_block(recipe, model, block):
  """The Rules of a recipe for the layers of one block, by their paths in it; inputs' ranges are found anew for each."""
  chosen = {site.path: rule for site, rule in rules.first_matches(recipe, rules.sites(model)).items()}
  found = []
  for path, rule in chosen.items():
    if rule is not None and path.startswith(f'{block}/'):
      fixed = rule.input is not None and rule.input.observer is not None
      own = re.escape(path[len(block) + 1:])
      found.append(dataclasses.replace(rule, path=own, kind='.*', input=STE(rule.input.spec) if fixed else rule.input))
  return found


def incoherence(model, task, recipe, seed=0):
  """QuIP: the weights that the recipe quantizes are rotated on both sides, by Hadamard transforms beside each layer."""
  chosen = rules.first_matches(recipe, rules.sites(model)).items()
  paths = [site.path for site, rule in chosen
           if rule is not None and rule.weight is not None and isinstance(site.module, nnx.Linear)]
  if not paths:
    raise ValueError("transform 'incoherence' rotates Linear layers, and the recipe quantizes none of this network. "
                     'Leave it out.')
  return incoherences.process(model, paths, jax.random.key(seed))


def equalize(model, task, recipe):
  """Cross-layer equalization through the links of the network from layer to layer; norms have no range to equal."""
  layers = {path for path, module in quantized.walk(model) if layouts.layer_type(module)}
  found = [link for link in linked(model, task) if link.source in layers]
  if not found:
    raise ValueError("transform 'equalize': no layer of this network feeds linear layers alone, so that their "
                     "ranges could be made equal. Use 'smooth' or 'smooth_inputs'.")
  return equalization.equalize(model, found)


def bias_correction(model, floats, task):
  """The mean error of each layer's outputs on the calibration batches goes into its bias."""
  if changed := [path for path, module in quantized.walk(model) if 'after' in vars(module)]:
    raise ValueError(f"transform 'bias_correction': the outputs of {changed[:4]} are turned after the bias is added. "
                     "Leave it, or 'incoherence', out.")
  return corrections.correct(model, floats, task.batches, tasks.call)


DISTANCES = dict(kl=end_to_end.divergence, squares=end_to_end.squares)


def scales(model, floats, task, steps=200, rate=1e-3, distance='kl'):
  """EfficientQAT's second phase: all scales together, on the outputs of the network, an example a step."""
  if distance not in DISTANCES:
    raise ValueError(f"transform 'scales': distance {distance!r} is none. {names.suggest(distance, DISTANCES)}")
  settings = end_to_end.Settings(steps, rate, distance=DISTANCES[distance])
  return end_to_end.tune(model, floats, task.examples(), tasks.call, settings)[0]


def outliers(model, task, recipe, channels=3, factor=100.0, seed=0):
  """Makes outliers to try the others on: some channels of what norms give grow by `factor`.

  Rows that read them shrink by as much. SmoothQuant undoes that exactly, so that what it regains is no evidence of what
  it does under outliers that a network has of itself.
  """
  found = links.find(model, *task.batches[0])
  if not found:
    raise ValueError("transform 'outliers': no norm of this network is read by linear layers alone. Leave it out.")
  smaller = {}
  for link, key in zip(found, jax.random.split(jax.random.key(seed), len(found))):
    shape = links.size(model, link)
    few = jax.random.choice(key, shape[-1], (channels,), replace=False)
    smaller[link] = jnp.ones(shape).at[..., few].set(1 / factor)
  return links.rescale(model, smaller)


def linked(model, task):
  """The links of a network: those that tracing sees, and those of the task that it has."""
  args = task.batches[0]
  there = [path for path, _ in quantized.walk(model)]
  patterns = [p for p in task.links if any(re.fullmatch(p.source, path) for path in there)]
  return (*links.find(model, *args), *(links.resolve(model, patterns, *args) if patterns else ()))


BEFORE = dict(smooth=smooth, smooth_inputs=smooth_inputs, rotate=rotate, spin=spin, equalize=equalize, let=let,
              incoherence=incoherence, outliers=outliers)
AFTER = dict(bias_correction=bias_correction, scales=scales)
TRANSFORMS = BEFORE | AFTER
GIVEN = 3  # The arguments of each that are no options.


def before(task, wanted, recipe):
  """The task's model after those of `wanted` that come before it is quantized.

  Args:
    task: a tasks.Task.
    wanted: dicts of a name and options, in order.
    recipe: Rules, for those that learn how well the network rounds.
  """
  model = task.model
  for make in _named(wanted, BEFORE):
    model = make(model, task, recipe)
  return model


def after(frozen, floats, task, wanted):
  """The frozen model after those of `wanted` that change what was solved."""
  for make in _named(wanted, AFTER):
    frozen = make(frozen, floats, task)
  return frozen


def _named(wanted, table):
  """Those of `wanted` that are in `table`, as functions; raises at any name or option that means nothing."""
  found = []
  for options in wanted:
    options = dict(options)
    name = options.pop('name', None)
    if name not in TRANSFORMS:
      raise ValueError(f'transform {name!r}: there is none of that name. {names.suggest(name, TRANSFORMS)}')
    known = list(inspect.signature(TRANSFORMS[name]).parameters)[GIVEN:]
    if unknown := sorted(set(options) - set(known)):
      raise ValueError(f'transform {name!r}: {unknown} mean nothing to it. It takes {known}.')
    if name in table:
      found.append(functools.partial(table[name], **options))
  return found
