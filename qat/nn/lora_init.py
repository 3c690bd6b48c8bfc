"""Where adapters start: at zero, at what rounding took away, or at the weight's own principal part.

    Random     A is random, B is zero: the model is what it was. Hu et al. 2021, Sec. 4.1.
    LoftQ      codes and A B that together are near W. Li et al. 2023. https://arxiv.org/abs/2310.08659
    PiSSA      A B is the principal part of W, which stays in floats without it. Meng et al. 2024.
               https://arxiv.org/abs/2404.02948
    QPiSSA     PiSSA, whose rest is put on the grid.

`loftq`, `pissa` and `qpissa` are functions of arrays, with s = 1. The values above are what `qat.lora(init=...)` takes.
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import qarray, ranges

# PEFT's default: uniform within 1 / sqrt(in), the variance that torch gives to linear layers.
KAIMING = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def gaussian(key, shape, dtype=jnp.float32):
  """N(0, 1 / r^2), as PEFT's `gaussian`."""
  return jax.random.normal(key, shape, dtype) / shape[-1]


@dataclasses.dataclass(frozen=True)
class Grid:
  """Puts a matrix on a grid, with the scales of a range rule."""
  spec: qarray.Spec
  rule: Callable = ranges.absmax

  def __call__(self, w):
    return qarray.encode(w, self.spec, *self.rule(w, self.spec))


def principal(w, rank):
  """The best A B of rank `rank`: w f32[i, o] -> A f32[i, r], B f32[r, o], which share the singular values.

  A spans the first eigenvectors U of w w^T, or of w^T w if that is smaller, and B = U^T w: a quarter of the time of a
  singular value decomposition of 576 x 1536. The square costs digits: singular values below 3e-4 of the largest, the
  root of float32's epsilon, are not told apart, so that ||w - A B|| may exceed the least by about that share of the
  largest. A B is a projection of w all the same.
  """
  if w.shape[0] > w.shape[1]:
    A, B = principal(w.T, rank)
    return B.T, A.T
  _, U = jnp.linalg.eigh(jnp.matmul(w, w.T, precision='highest'), symmetrize_input=False)
  U = U[:, ::-1][:, :rank]                                               # Eigenvalues come in rising order.
  B = jnp.matmul(U.T, w, precision='highest')                            # S V^T, with the digits that S^2 lost.
  root = jnp.sqrt(jnp.linalg.norm(B, axis=1))
  return U * root[None], B / jnp.where(root == 0, 1, root)[:, None]


def pissa(w, rank):
  """PiSSA: (w - A B, A, B), where A B is the principal part of w."""
  A, B = principal(w, rank)
  return w - A @ B, A, B


def qpissa(w, spec, rank, rule=ranges.absmax):
  """QPiSSA: (the codes of w - A B, A, B), where A B is the principal part of w."""
  rest, A, B = pissa(w, rank)
  return Grid(spec, rule)(rest), A, B


@functools.partial(jax.jit, static_argnames=('spec', 'rank', 'steps', 'rule'))
def loftq(w, spec, rank, steps=5, rule=ranges.absmax):
  """LoftQ, Algorithm 1: Q <- q(W - A B) and A B <- SVD_r(W - Q) take turns.

  Differences from the paper: it stops before the step at which ||W - Q - A B|| would rise, and so returns the best.

  Args:
    w: f32[i, o].
    spec: the grid.
    rank: of A B.
    steps: T, at most; the paper's scripts take 5.
    rule: of the scales.

  Returns:
    QArray[i, o], A f32[i, r], B f32[r, o].
  """
  grid, w = Grid(spec, rule), w.astype(jnp.float32)

  def step(A, B):
    Q = grid(w - A @ B)
    rest = w - qarray.decode(Q)
    A, B = principal(rest, rank)
    return (Q, A, B), jnp.linalg.norm(rest - A @ B)

  def body(state):
    t, best, error, _ = state
    new, new_error = step(*best[1:])
    fell = new_error < error
    best = jax.tree.map(lambda new, old: jnp.where(fell, new, old), new, best)
    return t + 1, best, jnp.minimum(new_error, error), fell

  zeros = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
  first, error = step(*zeros)
  state = (jnp.int32(1), first, error, jnp.bool_(True))
  return jax.lax.while_loop(lambda s: (s[0] < steps) & s[3], body, state)[1]


@dataclasses.dataclass(frozen=True)
class Base:
  """What an adapter is put beside, one matrix of it.

  Attributes:
    inputs, outputs: of A B; inputs are fewer than those of w if they are pooled.
    w: f32[in, out], or None where there are codes only.
    grid: the Grid of the weight's quantizer, or None if it has none that refits a matrix.
    scaling: s.
  """
  inputs: int
  outputs: int
  w: jax.Array | None
  grid: Grid | None
  scaling: float

  def floats(self, asked):
    """w; raises where `asked` cannot have it."""
    if self.w is None:
      raise ValueError(f'{asked} starts from the float weight, and the layer is frozen: it holds codes. Give qat.lora '
                       'the model that qat.freeze was given.')
    if self.inputs != len(self.w):
      raise ValueError(f'{asked} starts A with {len(self.w)} inputs, and pooling leaves {self.inputs}. Take group=1, '
                       'or Random().')
    return self.w

  def on_grid(self, asked):
    if self.grid is None:
      raise ValueError(f'{asked} puts the weight on its grid, and the layer has no weight quantizer that refits its '
                       'range to any matrix. Call qat.quantize with STE(spec) first, or take PiSSA() for floats.')
    return self.grid

  def divided(self, A, B):
    """A and B of s A B."""
    root = self.scaling**0.5
    return A / root, B / root


@dataclasses.dataclass(frozen=True)
class Random:
  """A from a JAX initializer, B = 0."""
  initializer: Callable = KAIMING

  def __call__(self, key, base, rank):
    """(None, A f32[in, r], B f32[r, out]): the weight stays. Others return what takes its place, floats or codes."""
    return None, self.initializer(key, (base.inputs, rank), jnp.float32), jnp.zeros((rank, base.outputs))


@dataclasses.dataclass(frozen=True)
class LoftQ:
  """Codes and A B that together are near the weight; see `loftq`."""
  steps: int = 5

  def __call__(self, key, base, rank):
    del key
    w, grid = base.floats(self), base.on_grid(self)
    Q, A, B = loftq(w, grid.spec, rank, self.steps, grid.rule)
    return Q, *base.divided(A, B)


@dataclasses.dataclass(frozen=True)
class PiSSA:
  """A B is the principal part of the weight, which keeps the rest in floats."""

  def __call__(self, key, base, rank):
    del key
    rest, A, B = pissa(base.floats(self), rank)
    return rest, *base.divided(A, B)


@dataclasses.dataclass(frozen=True)
class QPiSSA:
  """A B is the principal part of the weight, and the rest goes on the grid."""

  def __call__(self, key, base, rank):
    del key
    w, grid = base.floats(self), base.on_grid(self)
    Q, A, B = qpissa(w, grid.spec, rank, grid.rule)
    return Q, *base.divided(A, B)
