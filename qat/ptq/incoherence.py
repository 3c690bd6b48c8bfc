"""Incoherence processing: rotate a weight on both sides, so that no number of it is much larger than the others.

Chee et al. QuIP, NeurIPS 2023, Sec. 4. https://arxiv.org/abs/2307.13304 (random orthogonal matrices).
Tseng et al. QuIP#, ICML 2024, Sec. 3. https://arxiv.org/abs/2402.04396 (Hadamard matrices with random signs).

y = x w = (x U) (U^T w V) V^T: the inputs are rotated before the product and the outputs after it, and in between is a
weight that rounds well, under the Hessian U^T H U. An m x n matrix is mu-incoherent if max|w| <= mu |w|_F / sqrt(m n).

`process` puts the rotations into a network, as Hadamard transforms that run beside each layer.

Differences from the papers: QuIP's rescaling of rows by H's diagonal is left out; U and V are whole matrices, where
theirs are products of small ones; a side of a layer for whose width there is no Hadamard matrix stays as it is.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import hadamard
from qat.ptq import channels, hessian, online


def process(model, paths, key):
  """A copy of `model` with the same outputs, whose layers at `paths` have rotated weights.

  Args:
    model: in floats.
    paths: of Linear layers, each with one kernel [i, o].
    key: of the signs.
  """
  channels.refuse_quantized(model, 'incoherence.process')
  model = nnx.clone(model)
  for i, path in enumerate(sorted(paths)):  # A model of another history may have its layers in another order.
    layer = channels.find(model, path)
    n, m = channels.input_rows(layer, path), channels.shape(layer, path)[-1]
    into, out_of = (jax.random.rademacher(k, (size,), jnp.int8)
                    for k, size in zip(jax.random.split(jax.random.fold_in(key, i)), (n, m)))
    if hadamard.is_constructible(n):
      U_T = hadamard.orthonormal(n, into).T
      online.insert(layer, online.Hadamard(into), functools.partial(_matmul, U_T), path)
    if hadamard.is_constructible(m):
      V_T = hadamard.orthonormal(m, out_of)                              # y V^T is transform(y, signs).
      online.append(layer, online.Hadamard(out_of), lambda w, V_T=V_T: _matmul(w, V_T.T), path)
  return model


def signed_hadamard(key, n):
  """A Hadamard matrix with random signs: f32[n, n]. Raises for an n that has none."""
  return hadamard.randomized(key, n)


def random_orthogonal(key, n):
  """Uniform among all rotations and reflections: f32[n, n], for any n."""
  return jax.random.orthogonal(key, n)


def rotate(w, H, U, V):
  """What is rounded in place of w: U^T w V, and its Hessian U^T H U.

  Args:
    w: f32[i, o].
    H: f32[i, i].
    U, V: f32[i, i] and f32[o, o], orthogonal.
  """
  return _product(U.T, w, V), _product(U.T, H, U)


def rotate_back(w, U, V):
  """The weight that stands for a rotated one: U w V^T."""
  return _product(U, w, V.T)


def incoherence(w):
  """mu(w) = max|w| sqrt(i o) / |w|_F: f32[]. About 1 at best, and sqrt(i o) if a single number is not 0."""
  return jnp.max(jnp.abs(w)) / jnp.sqrt(jnp.mean(w * w))


def _matmul(a, b):
  return jnp.matmul(a, b, precision=hessian.HIGHEST)


def _product(a, b, c):
  return jnp.linalg.multi_dot([a, b, c], precision=hessian.HIGHEST)
