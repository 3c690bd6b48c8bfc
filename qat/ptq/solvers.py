"""Solvers: which codes a weight gets, from what is known of its inputs.

A solver is `(w: f32[i, o], moments: Moments, spec) -> (QArray[i, o], notes)`. `notes` is a dict of numbers and words
for the coverage report; its 'fallback', if there is one, says why the solver did something else than it was asked.
Solvers are frozen dataclasses: they hash, compare and print. The mathematics is in a file a paper beside this one.

Methods that leave something else than a QArray (codebook_vectors, sparse) are functions of arrays only.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from qat.core import qarray, ranges
from qat.ptq import gptq, hessian, hqq, ldlq, qronos, quantease, scales


@dataclasses.dataclass(frozen=True)
class Nearest:
  """Rounds to nearest, with the scales of a range rule."""
  rule: Callable = ranges.absmax

  def __call__(self, w, moments, spec):
    return qarray.encode(w, spec, *scales.fit(self.rule, w, spec, moments.H)), {}


@dataclasses.dataclass(frozen=True)
class Factored:
  """What walks along rows under a factor of the damped H. A subclass says how, by `codes`."""
  damp: float = 0.01
  act_order: bool = True
  rule: Callable = scales.HessianSearch()

  def __call__(self, w, moments, spec):
    factor = hessian.factor(moments.H, self.damp, self.act_order)
    grid = spec, *scales.fit(self.rule, w, spec, moments.H)
    return self.codes(w, factor, moments, *grid), hessian.notes(factor, self.damp)


class GPTQ(Factored):
  """GPTQ: rows absorb the errors of those before them. See gptq.py."""

  def codes(self, w, factor, moments, *grid):
    del moments
    return gptq.walk(w, factor, *grid)


class LDLQ(Factored):
  """QuIP's rounding, without its rotations: GPTQ's codes, found in another way. See ldlq.py."""

  def codes(self, w, factor, moments, *grid):
    del moments
    return ldlq.ldlq(w, factor, *grid)


class Qronos(Factored):
  """Makes up for the errors of the layers before: it takes moments.Drifted. See qronos.py."""

  def codes(self, w, factor, moments, *grid):
    return qronos.qronos(w, factor, moments.G, *grid)


@dataclasses.dataclass(frozen=True)
class QuantEase:
  """Another solver's codes, made better: scales by least squares and codes by coordinate descent take turns.

  See scales.refit and quantease.py. The damped error falls, or stays, in each of the `rounds`.
  """
  start: Callable = GPTQ()
  rounds: int = 2
  sweeps: int = 2
  damp: float = 0.01

  def __call__(self, w, moments, spec):
    q, notes = self.start(w, moments, spec)
    if not bool(jnp.all(jnp.isfinite(moments.H))):
      return q, notes | dict(fallback=notes.get('fallback', 'nothing was refined: H is not finite'))
    H = damped(moments.H, self.damp)
    for _ in range(self.rounds):
      q = quantease.descend(w, H, scales.refit(w, H, q), self.sweeps)
    return q, notes


@dataclasses.dataclass(frozen=True)
class HQQ:
  """Half-quadratic quantization, which looks at no inputs. See hqq.py."""
  settings: hqq.Settings = hqq.Settings()
  rule: Callable = ranges.absmax

  def __call__(self, w, moments, spec):
    return hqq.hqq(w, spec, *scales.fit(self.rule, w, spec, moments.H), self.settings), {}


@jax.jit
def damped(H, damp):
  """H with `damp` times its mean diagonal on its diagonal."""
  return H + damp * jnp.mean(jnp.diag(H)) * jnp.eye(len(H))


NEAREST = Nearest()
