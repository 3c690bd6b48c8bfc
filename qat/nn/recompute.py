"""Products with frozen codes that hold the decoded weight of one layer at a time.

Reverse mode would keep each decoded weight, which dx = dy W^T needs: a float copy of the whole model. Here the backward
pass decodes the codes again. jax.checkpoint asks for that as well, but XLA's CPU backend drops its barrier and merges
the two decodings into one, and its scheduler is free to decode all layers before it runs the first. So codes are read
where a number of x, or of dy on the way back, is not above infinity: none is, but the compiler waits for it.
"""

import dataclasses

import jax
import jax.numpy as jnp


def product(f, x, q):
  """f(x, q), whose gradient for x decodes q again, and whose gradient for q is zero.

  Args:
    f: (x, q) -> an array; it closes over nothing that is differentiated.
    x: float[*shape].
    q: a QArray.
  """
  @jax.custom_vjp
  def run(x, q):
    return f(x, after(q, x))

  def backward(kept, dy):
    x, q = kept
    _, pull = jax.vjp(lambda x: f(x, after(q, dy)), x)
    return *pull(dy), None

  run.defvjp(lambda x, q: (run(x, q), (x, q)), backward)
  return run(x, q)


def after(q, x):
  """`q`, which cannot be read before `x` is there."""
  if x.size == 0:
    return q
  never = x[(0,) * x.ndim] > jnp.asarray(jnp.inf, x.dtype)
  return dataclasses.replace(q, codes=jnp.where(never, jnp.zeros_like(q.codes), q.codes))
