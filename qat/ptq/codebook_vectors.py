"""Vector codebooks: d numbers of a column share one code, which stands for a point of R^d.

Codebook: k-means, weighted with H's diagonal. Codes: GPTQ with d rows at a time, as in
van Baalen et al. GPTVQ: The Blessing of Dimensionality for LLM Quantization, 2024. https://arxiv.org/abs/2402.15319
Tuples of consecutive inputs, and one scale an output, as in
Egiazarian et al. Extreme Compression of Large Language Models via Additive Quantization (AQLM), ICML 2024.
https://arxiv.org/abs/2401.06118

A tuple's error e costs |R_dd^T e|^2 once the rows below have made up for it, R_dd the tuple's block of the factor
H = R R^T: the code is chosen, and the rest is updated, by that.

Differences from the papers: one codebook for the matrix and no additive ones; k-means starts from random tuples,
and from a subset of the tuples; codes are not tuned after GPTQ, nor is the codebook.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.ptq import hessian

SCALE_BITS = CODEBOOK_BITS = 16
SAMPLE = 2**16  # tuples from which a codebook is learned
CHUNK = 2**14   # tuples whose distances are in memory at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VectorArray:
  """A matrix [i, o] of codes of d numbers each.

  Attributes:
    codes: i32[i / d, o].
    codebook: f16[k, d].
    scale: f16[1, o].
  """
  codes: Any
  codebook: Any
  scale: Any

  shape = property(lambda self: (self.codes.shape[0] * self.codebook.shape[1], self.codes.shape[1]))

  def decode(self):
    """f32[i, o]."""
    tuples = self.codebook.astype(jnp.float32)[self.codes]                 # f32[i / d, o, d]
    return jnp.moveaxis(tuples, 2, 1).reshape(self.shape) * self.scale.astype(jnp.float32)

  @property
  def nbits(self):
    """Bits of storage: codes of a whole number of bits, codebook and scales."""
    code_bits = max((len(self.codebook) - 1).bit_length(), 1)
    return code_bits * self.codes.size + CODEBOOK_BITS * self.codebook.size + SCALE_BITS * self.scale.size

  @property
  def bits_per_weight(self):
    return self.nbits / math.prod(self.shape)


@functools.partial(jax.jit, static_argnames=('size', 'dimension', 'iterations'))
def vectors(w, factor, key, size=256, dimension=4, iterations=30):
  """A vector-quantized `w` that nearly minimizes tr(dW^T H dW).

  Args:
    w: f32[i, o].
    factor: of H, by `hessian.factor`, in the inputs' own order (no act_order).
    key: of the tuples from which k-means starts.
    size: of the codebook; log2(size) / dimension bits a number.
    dimension: d, which divides i.
    iterations: of k-means.

  Returns:
    VectorArray[i, o], on no output worse than the nearest codes.
  """
  hessian.check(w, factor.H)
  if w.shape[0] % dimension:
    raise ValueError(f'dimension {dimension}: a weight of {w.shape[0]} inputs has no whole number of such tuples. '
                     f'Pick a divisor of {w.shape[0]}.')
  w = factor.live(w)
  scale = jnp.sqrt(jnp.mean(w * w, axis=0, keepdims=True)).astype(jnp.float16)
  unit = w * qarray.reciprocal(scale.astype(jnp.float32))
  tuples = _tuples(unit, dimension)                                        # f32[i / d, o, d]
  importance = jnp.broadcast_to(jnp.diag(factor.H).reshape(-1, 1, dimension), tuples.shape)
  flat, weight = tuples.reshape(-1, dimension), importance.reshape(-1, dimension)
  if len(flat) < size:
    raise ValueError(f'size {size}: a weight of shape {w.shape} has {len(flat)} tuples of {dimension}. Ask for fewer.')
  chosen = jax.random.permutation(key, len(flat))[:SAMPLE]
  codebook = kmeans(flat[chosen], weight[chosen], size, iterations).astype(jnp.float16)
  near = nearest(flat, weight, codebook).reshape(tuples.shape[:2])
  solved = VectorArray(assign(unit, factor.R, codebook), codebook, scale)
  near = dataclasses.replace(solved, codes=near)
  error = lambda q: hessian.objective(q.decode() - w, factor.H)
  return dataclasses.replace(solved, codes=jnp.where((error(solved) < error(near))[None], solved.codes, near.codes))


def kmeans(x, weight, size, iterations):
  """Lloyd's algorithm for sum weight (x - c)^2, from the first `size` points.

  Args:
    x: f32[n, d].
    weight: f32[n, d].
    size: number of points of the codebook.
    iterations: of Lloyd's. A point that nothing is nearest to stays where it is.

  Returns:
    f32[size, d].
  """
  def iterate(codebook, _):
    codes = nearest(x, weight, codebook)
    total = jax.ops.segment_sum(weight, codes, size)
    mean = jax.ops.segment_sum(weight * x, codes, size) / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, mean, codebook), None

  return jax.lax.scan(iterate, x[:size], length=iterations)[0]


def nearest(x, weight, codebook):
  """The code of the least sum_j weight_j (x_j - c_j)^2: f32[n, d], f32[n, d], [k, d] -> i32[n]."""
  c = codebook.astype(jnp.float32)
  short = -len(x) % CHUNK if len(x) > CHUNK else 0
  chunks = [jnp.pad(a, [(0, short), (0, 0)]).reshape(-1, min(len(x), CHUNK), a.shape[1]) for a in (x, weight)]

  def chunk(given):
    x, weight = given
    cross = jnp.matmul(weight * x, c.T, precision=hessian.HIGHEST)
    return jnp.argmin(jnp.matmul(weight, (c * c).T, precision=hessian.HIGHEST) - 2 * cross, axis=1)

  return jax.lax.map(chunk, tuple(chunks)).reshape(-1)[:len(x)].astype(jnp.int32)


def assign(w, R, codebook):
  """GPTQ's loop over tuples of rows.

  Args:
    w: f32[i, o], in units of the codebook.
    R: f32[i, i], upper: H = R R^T.
    codebook: [k, d].

  Returns:
    i32[i / d, o].
  """
  d, c = codebook.shape[1], codebook.astype(jnp.float32)
  U = jax.scipy.linalg.solve_triangular(R, jnp.eye(len(w)))                # U^T U = H^-1
  dot = functools.partial(jnp.matmul, precision=hessian.HIGHEST)

  def step(w, given):
    start, U = given                                                       # U: f32[d, i]
    block = jax.lax.dynamic_slice(R, (start, start), (d, d))               # R_dd
    v = jax.lax.dynamic_slice_in_dim(w, start, d)                          # f32[d, o]
    points = dot(c, block)                                                 # f32[k, d]: R_dd^T c
    distance = jnp.sum(points * points, axis=1)[:, None] - 2 * dot(points, dot(block.T, v))
    codes = jnp.argmin(distance, axis=0).astype(jnp.int32)                 # i32[o]
    error = dot(block.T, v - c[codes].T)                                   # U_dd^-T e
    return w - dot(U.T, error), codes

  _, codes = jax.lax.scan(step, w, (jnp.arange(0, len(w), d), U.reshape(-1, d, len(w))))
  return codes


def _tuples(w, d):
  """f32[i, o] -> f32[i / d, o, d]."""
  return jnp.moveaxis(w.reshape(-1, d, w.shape[1]), 1, 2)
