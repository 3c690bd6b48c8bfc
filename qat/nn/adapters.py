"""An adapter: two thin matrices beside a weight that stays as it is, W + s A B.

    y = x W + s (dropout(x) A) B

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022. https://arxiv.org/abs/2106.09685
Kalajdzievski. A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023. https://arxiv.org/abs/2312.03732
Liu et al. DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024. https://arxiv.org/abs/2402.09353
Xu et al. QA-LoRA: Quantization-Aware Low-Rank Adaptation, ICLR 2024. https://arxiv.org/abs/2309.14717

Everything is in the form of qat/nn/layouts.py: W is [*lead, in, out], so A [*lead, in, r] and B [*lead, r, out] are
the paper's transposed, whatever the layer. The matrices of an Embed are features x words.

Differences from the papers: DoRA's magnitudes are one an output (its Eq. (5) says columns of W[d, k], which stand
for outputs in its code as well), and its dropout leaves the input of W alone, where the authors drop that too.
"""

from flax import nnx
import jax
import jax.numpy as jnp

LoRAParam = nnx.LoRAParam  # What trains: nnx.Optimizer(model, tx, wrt=LoRAParam).


def by_rank(alpha, rank):
  """LoRA's s = alpha / r."""
  return alpha / rank


def by_root_of_rank(alpha, rank):
  """rsLoRA's s = alpha / sqrt(r), under which features learn alike at every rank (its Eq. (3))."""
  return alpha / rank**0.5


class Adapter(nnx.Module):
  """A, B and what they are used with. Only LoRAParams train.

  Attributes:
    A: f32[*lead, in / group, r].
    B: f32[*lead, r, out].
    magnitude: DoRA's f32[*lead, out], or None.
    alpha, scaling: the latter is s, a float.
    group: inputs are summed over groups of this size before A (QA-LoRA); 1 leaves them as they are.
    dropout: an nnx.Dropout of the input of A, or None. `model.eval()` stops it, as everywhere.
    active: whether the layer uses it.
  """

  def __init__(self, A, B, alpha, scaling, group=1):
    self.A, self.B = LoRAParam(A), LoRAParam(B)
    self.magnitude, self.dropout = nnx.data(None), nnx.data(None)
    self.alpha, self.scaling, self.group, self.active = float(alpha), float(scaling), group, True

  @property
  def rank(self):
    return self.B.get_value().shape[-2]

  @property
  def matrices(self):
    """A f32[*lead, in, r] and s B f32[*lead, r, out]: their product is added to the weight."""
    A = self.A.get_value()
    return A if self.group == 1 else jnp.repeat(A, self.group, axis=-2), self.scaling * self.B.get_value()

  def __call__(self, x):
    """s (dropout(x) A) B: float[*lead, *rows, in] -> [*lead, *rows, out], in x's dtype."""
    x = x if self.dropout is None else self.dropout(x)
    A, B = (p.get_value().astype(x.dtype) for p in (self.A, self.B))
    return batched(batched(pool(x, self.group), A), B) * jnp.asarray(self.scaling, x.dtype)


def batched(x, w):
  """[*batch, *rows, k] @ [*batch, k, n] -> [*batch, *rows, n]."""
  batch = tuple(range(w.ndim - 2))
  return jax.lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 2,)), (batch, batch)))


def pool(x, group):
  """Sums over groups of inputs: [..., in] -> [..., in / group]."""
  return x if group == 1 else jnp.sum(x.reshape(*x.shape[:-1], x.shape[-1] // group, group), -1)


def norms(w):
  """The length of each output's weights: f32[*lead, in, out] -> f32[*lead, out]."""
  return jnp.sqrt(jnp.sum(w * w, -2))


def moved(w, adapters):
  """W + sum of s A B, before magnitudes: [*lead, in, out] -> f32[*lead, in, out]."""
  w = w.astype(jnp.float32)
  for adapter in adapters:
    w = w + jnp.matmul(*adapter.matrices)
  return w


def gain(w, adapters):
  """What DoRA multiplies each output by, m / ||W + s A B||: f32[*lead, out], or None without magnitudes.

  The norm is a constant for the gradient (DoRA, Eq. (11)). An output whose weights are all zero keeps its magnitude.
  """
  magnitude = next((a.magnitude for a in adapters if a.magnitude is not None), None)
  if magnitude is None:
    return None
  length = norms(jax.lax.stop_gradient(moved(w, adapters)))
  return magnitude.get_value() / jnp.where(length == 0, jnp.ones_like(length), length)


def merged(w, adapters):
  """The weight that the adapters make of `w`: [*lead, in, out] -> f32[*lead, in, out]."""
  g = gain(w, adapters)
  return moved(w, adapters) if g is None else moved(w, adapters) * g[..., None, :]
