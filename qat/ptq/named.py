"""Named methods: what `config.method` says, as values. Each is a function of its options."""

import dataclasses
import difflib
import inspect

from qat.core import ranges
from qat.ptq import awq as clipping, methods, presets, reconstruct, scales, solvers
from qat.quantizers import base
from qat.quantizers.adaround import AdaRound
from qat.quantizers.autoround import SignRound

RULES = dict(absmax=ranges.absmax, midrange=ranges.midrange, search=ranges.Search(), hessian=scales.HessianSearch())


def nearest(rule='absmax'):
  """Round to nearest."""
  return methods.Layerwise(solvers.Nearest(_rule(rule)))


def gptq(rule='hessian', damp=0.01, act_order=True):
  """GPTQ (qat/ptq/gptq.py)."""
  return methods.Layerwise(solvers.GPTQ(damp=damp, act_order=act_order, rule=_rule(rule)))


def quantease(rule='hessian', damp=0.01, rounds=2, sweeps=2):
  """GPTQ's codes, refined by coordinate descent and least-squares scales (qat/ptq/quantease.py)."""
  return methods.Layerwise(solvers.QuantEase(solvers.GPTQ(damp=damp, rule=_rule(rule)), rounds, sweeps, damp))


def ldlq(rule='hessian', damp=0.01):
  """QuIP's rounding (qat/ptq/ldlq.py)."""
  return methods.Layerwise(solvers.LDLQ(damp=damp, rule=_rule(rule)))


def hqq():
  """HQQ (qat/ptq/hqq.py), for grids that have a zero."""
  return methods.Layerwise(solvers.HQQ())


def awq(rule='absmax', links=()):
  """AWQ: scales, then clipped ranges."""
  return methods.Scaled(methods.Layerwise(clipping.Clipped()), tuple(links), _rule(rule))


def adaround(steps=1000, batch_size=8, rate=1e-2, start=''):
  """AdaRound on blocks, by default from round to nearest."""
  settings = dataclasses.replace(presets.ADAROUND, steps=steps, batch_size=batch_size,
                                 groups=(reconstruct.Group(base.Rounding, rate),))
  return methods.Blockwise(AdaRound, settings, _start(start))


def autoround(steps=200, batch_size=8, start=''):
  """SignRound on blocks."""
  settings = dataclasses.replace(presets.AUTOROUND, steps=steps, batch_size=batch_size)
  return methods.Blockwise(SignRound, settings, _start(start))


METHODS = dict(rtn=nearest, gptq=gptq, quantease=quantease, ldlq=ldlq, hqq=hqq, awq=awq, adaround=adaround,
               autoround=autoround)


def named(name, links=(), **options):
  """The method of a config's {'name': 'gptq', 'damp': 0.05}.

  Args:
    name: of METHODS.
    links: those of the network that tracing cannot see, for methods that use any.
    **options: of the method.

  >>> named('rtn', rule='midrange').solver.rule.__name__
  'midrange'
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, 1)
    hint = f'Did you mean {near[0]!r}? ' if near else ''
    raise ValueError(f'method {name!r}: there is none of that name. {hint}Known: {", ".join(METHODS)}.')
  known = inspect.signature(METHODS[name]).parameters
  if unknown := sorted(set(options) - set(known)):
    raise ValueError(f'method {name!r}: {unknown} mean nothing to it. It takes {sorted(set(known) - {"links"})}.')
  return METHODS[name](**options, **dict(links=links) if 'links' in known else {})


def _start(name):
  """The Layerwise method from whose codes learning starts: a name, or ''."""
  return named(name) if name else None


def _rule(name):
  if name not in RULES:
    raise ValueError(f'range rule {name!r}: there is none of that name. Known: {", ".join(RULES)}.')
  return RULES[name]
