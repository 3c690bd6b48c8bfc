"""Gradient checkpointing: modules that keep their inputs only, and run again in the backward pass.

Chen et al. Training Deep Nets with Sublinear Memory Cost, 2016. https://arxiv.org/abs/1604.06174

jax.checkpoint does it by a barrier, which XLA's CPU backend drops; then it merges the second run with the first and
keeps all of it. So here, as in qat/nn/recompute.py, the second run depends on the gradient that comes in.
"""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp

from qat.nn import quantized
from qat.nn import weights


def remat(model, pattern):
  """A copy of `model` whose modules with a path that matches the regular expression keep their inputs only.

  Args:
    model: any nnx.Module.
    pattern: for whole paths, of modules that are called on arrays and return one.
  """
  model = nnx.clone(model)
  found = list(quantized.walk(model))
  chosen = [module for path, module in found if re.fullmatch(pattern, path)]
  if not chosen:
    there = [path for path, _ in found if path]
    raise ValueError(f'remat {pattern!r} matches no module; there are {there[:12]}. Write a regular expression for '
                     r"whole paths, such as 'blocks/\d+'.")
  for module in chosen:
    module.__class__ = remat_type(type(module))
  return model


@functools.cache
def remat_type(cls):
  """The subclass of a module class whose calls are run again in the backward pass."""

  class Layer(cls):

    def __call__(self, *args):
      return _run(cls.__call__, self, args)

  Layer.__name__ = Layer.__qualname__ = f'Remat{cls.__name__}'
  return Layer


def _run(forward, module, args):
  """forward(module, *args), of which nothing is kept but the arrays of the module and the arguments."""
  graph, params, codes, state = nnx.split(module, nnx.Param, weights.Codes, ...)

  def f(params, codes, state, args):
    codes, state = jax.tree.map(lambda x: x, (codes, state))             # Variables of this trace, which may change.
    here = nnx.merge(graph, params, codes, state)
    y = forward(here, *args)
    return y, nnx.split(here, nnx.Param, weights.Codes, ...)[-1]         # Dropout counts its calls.

  @jax.custom_vjp
  def run(params, codes, state, args):
    return f(params, codes, state, args)

  def backward(kept, cotangents):
    dy, _ = cotangents
    params, codes, state, args = kept
    codes, args = _after((codes, args), dy)
    _, pull = jax.vjp(lambda params, args: f(params, codes, state, args)[0], params, args)
    dparams, dargs = pull(dy)
    return dparams, None, None, dargs

  run.defvjp(lambda *operands: (f(*operands), operands), backward)
  y, state = run(params, codes, state, args)
  nnx.update(module, state)
  return y


def _after(tree, dy):
  """`tree`, which cannot be read before `dy` is there; where that begins with a NaN, so does every gradient."""
  first = dy[(0,) * dy.ndim]
  return jax.tree.map(lambda x: jnp.where(first == first, x, jnp.zeros_like(x)), tree)
