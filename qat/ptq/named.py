"""Named methods: what `config.method` says, as values. Each is a function of its options.

The numbers of the papers are in qat/ptq/presets.py; the options here start from fewer steps at higher rates, which a
machine without an accelerator can afford. A `rule` is a name of RULES, `start` a name of METHODS from whose codes
learning starts, or ''; `sequential` solves the layers of a block one after another, each on what the quantized ones
before it give.
"""

import dataclasses
import difflib
import functools
import inspect

from qat.core import ranges
from qat.ptq import awq as clipping, hqq as half_quadratic, methods, presets, scales, solvers
from qat.quantizers.adaround import AdaRound
from qat.quantizers.autoround import SignRound
from qat.quantizers.efficient import LearnedGrid
from qat.quantizers.flexround import FlexRound
from qat.quantizers.lwc import LWC

RULES = dict(absmax=ranges.absmax, midrange=ranges.midrange, search=ranges.Search(), hessian=scales.HessianSearch())


def nearest(rule='absmax'):
  """Round to nearest."""
  return methods.Layerwise(solvers.Nearest(_rule(rule)))


def gptq(rule='hessian', damp=0.01, act_order=True, sequential=False):
  """GPTQ (qat/ptq/gptq.py)."""
  return methods.Layerwise(solvers.GPTQ(damp, act_order, _rule(rule)), sequential)


def quantease(rule='hessian', damp=0.01, rounds=2, sweeps=2, sequential=False):
  """GPTQ's codes, refined by coordinate descent and least-squares scales (qat/ptq/quantease.py)."""
  start = solvers.GPTQ(damp=damp, rule=_rule(rule))
  return methods.Layerwise(solvers.QuantEase(start, rounds, sweeps, damp), sequential)


def ldlq(rule='hessian', damp=0.01, act_order=True, sequential=False):
  """QuIP's rounding (qat/ptq/ldlq.py)."""
  return methods.Layerwise(solvers.LDLQ(damp, act_order, _rule(rule)), sequential)


def quip(rule='hessian', damp=0.01, act_order=True, sequential=False):
  """LDLQ, on a network that the transform 'incoherence' has rotated: that is half of QuIP."""
  return ldlq(rule, damp, act_order, sequential)


def qronos(rule='hessian', damp=0.01, act_order=True, sequential=False):
  """Qronos (qat/ptq/qronos.py): the float model's inputs count as well."""
  return methods.Drifted(solvers.Qronos(damp, act_order, _rule(rule)), sequential)


def hqq(p=0.7, beta=10.0, kappa=1.01, iterations=20, rule='absmax'):
  """HQQ (qat/ptq/hqq.py): the zero of each block, or the scale of grids that have none."""
  return methods.Layerwise(solvers.HQQ(half_quadratic.Settings(p, beta, kappa, iterations), _rule(rule)))


def awq(rule='absmax', sequential=False, links=()):
  """AWQ: scales, then clipped ranges."""
  return methods.Scaled(methods.Layerwise(clipping.Clipped(), sequential), tuple(links), _rule(rule))


def adaround(steps=1000, batch_size=8, rate=1e-2, regularization=0.01, rule='search', start=''):
  """AdaRound on blocks, by default from round to nearest."""
  quantizer = functools.partial(AdaRound, rule=_rule(rule), regularization=regularization)
  return methods.Blockwise(quantizer, _settings(presets.ADAROUND, steps, batch_size, rate), _start(start))


def brecq(steps=1000, batch_size=8, rate=1e-2, regularization=0.01, rule='search', start='', loss=None):
  """AdaRound on blocks, whose errors are weighed by the Fisher information of the task's loss (qat/ptq/fisher.py)."""
  method = adaround(steps, batch_size, rate, regularization, rule, start)
  return dataclasses.replace(method, loss=loss or _no_loss)


def qdrop(steps=1000, batch_size=8, rate=1e-2, step_rate=4e-5, probability=0.5, regularization=0.01, rule='search',
          start=''):
  """AdaRound on blocks and the inputs' learned steps together, while inputs are left in floats at random."""
  quantizer = functools.partial(AdaRound, rule=_rule(rule), regularization=regularization)
  settings = _settings(presets.QDROP, steps, batch_size, rate, step_rate)
  return methods.Blockwise(quantizer, settings, _start(start), inputs=functools.partial(methods.dropped, probability))


def flexround(steps=1000, batch_size=8, rate=3e-3, rule='search'):
  """FlexRound on blocks."""
  quantizer = functools.partial(FlexRound, rule=_rule(rule))
  return methods.Blockwise(quantizer, _settings(presets.FLEXROUND, steps, batch_size, rate, rate))


def autoround(steps=200, batch_size=8, reach=0.5, rule='absmax', start=''):
  """SignRound on blocks; `reach` is how far its V can go in all the steps, of the 0.5 that it may."""
  rate = 2 * reach / steps  # With the linear decay, half of rate * steps.
  quantizer = functools.partial(SignRound, rule=_rule(rule))
  return methods.Blockwise(quantizer, _settings(presets.AUTOROUND, steps, batch_size, rate, rate), _start(start))


def omniquant(steps=500, batch_size=4, rate=1e-2, rule='absmax'):
  """OmniQuant's learned clipping on blocks; its other half is the transform 'let'."""
  return methods.Blockwise(functools.partial(LWC, rule=_rule(rule)),
                           _settings(presets.OMNIQUANT_LWC, steps, batch_size, rate))


def efficientqat(steps=1000, batch_size=2, rate=1e-4, weight_rate=1e-5, rule='absmax'):
  """EfficientQAT's first phase, Block-AP: weights, steps and zeros of a block; its second is the transform 'scales'."""
  settings = _settings(presets.EFFICIENTQAT_BLOCK_AP, steps, batch_size, rate, weight_rate)
  return methods.Blockwise(functools.partial(LearnedGrid, rule=_rule(rule)), settings)


def tesseraq(steps=1000, batch_size=4, rate=1e-2, rounds=20, rule='search', start=''):
  """AdaRound on blocks whose roundings are fixed, the hardest last, in `rounds` rounds (TesseraQ)."""
  settings = dataclasses.replace(_settings(presets.TESSERAQ, steps, batch_size, rate), checks=rounds)
  quantizer = functools.partial(AdaRound, rule=_rule(rule), regularization=0.0)
  return methods.Blockwise(quantizer, settings, _start(start))


METHODS = dict(
    rtn=nearest, gptq=gptq, quantease=quantease, ldlq=ldlq, quip=quip, qronos=qronos, hqq=hqq, awq=awq,
    adaround=adaround, brecq=brecq, qdrop=qdrop, flexround=flexround, autoround=autoround, omniquant=omniquant,
    efficientqat=efficientqat, tesseraq=tesseraq)
# What a method gets from the task, and no config says.
FROM_TASK = ('links', 'loss')


def named(name, links=(), loss=None, **options):
  """The method of a config's {'name': 'gptq', 'damp': 0.05}.

  Args:
    name: of METHODS.
    links: those of the network that tracing cannot see, for methods that use any.
    loss: (model, batch) -> f32[], what the network was trained for, likewise.
    **options: of the method.

  >>> named('rtn', rule='midrange').solver.rule.__name__
  'midrange'
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, 1)
    hint = f'Did you mean {near[0]!r}? ' if near else ''
    raise ValueError(f'method {name!r}: there is none of that name. {hint}Known: {", ".join(METHODS)}.')
  known = set(inspect.signature(METHODS[name]).parameters)
  if unknown := sorted(set(options) - known):
    raise ValueError(f'method {name!r}: {unknown} mean nothing to it. It takes {sorted(known - set(FROM_TASK))}.')
  given = dict(links=links, loss=loss)
  return METHODS[name](**options, **{key: given[key] for key in FROM_TASK if key in known})


def _settings(preset, steps, batch_size, *rates):
  """A preset with other steps, examples a step, and rates, one a group."""
  groups = tuple(dataclasses.replace(group, rate=rate) for group, rate in zip(preset.groups, rates, strict=True))
  return dataclasses.replace(preset, steps=steps, batch_size=batch_size, groups=groups)


def _start(name):
  """The Layerwise method from whose codes learning starts: a name, or ''."""
  method = named(name) if name else None
  if method is not None and not isinstance(method, methods.Layerwise):
    known = ', '.join(n for n, make in METHODS.items() if isinstance(make(), methods.Layerwise))
    raise ValueError(f'start {name!r}: learning starts from codes of single layers. Give one of {known}.')
  return method


def _rule(name):
  if name not in RULES:
    raise ValueError(f'range rule {name!r}: there is none of that name. Known: {", ".join(RULES)}.')
  return RULES[name]


def _no_loss(model, batch):
  raise ValueError("method 'brecq' weighs errors by the gradients of the task's loss, and this task names none. "
                   "Use 'adaround', or give the task a loss.")
