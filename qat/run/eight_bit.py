"""8-bit optimizer states: the moments are kept as codes, in blocks under one absmax each.

Dettmers et al. 8-bit Optimizers via Block-wise Quantization, ICLR 2022. https://arxiv.org/abs/2110.02861
Sec. 2: the moments are decoded, the optimizer does in float32 what it always does, and they are encoded again.
Sec. 2.2: the dynamic map, signed for a first moment, with a bit more of fraction for a second one, which is >= 0.

Rounding loses what moves a moment by less than half a level (1 % at the top of a block): with gradients that have no
noise, a decay of 0.99 may stand still.
Difference from the paper: embeddings have 8-bit states too, as any matrix (Sec. 2.3 leaves them in 32).
"""

import jax
import optax

from qat.core import codebooks, qarray
from qat.core.blocks import Flat

# By the name of the field in optax's states.
MAPS = dict(mu=codebooks.DYNAMIC8, nu=codebooks.DYNAMIC8_UNSIGNED)
SMALLEST = 4096                                                         # Sec. 2.3: smaller arrays stay in float32.


def eight_bit(inner, block=256, smallest=SMALLEST, maps=None):
  """An optax transformation that is `inner`, its `mu` and `nu` kept in 8 bits between steps.

  Args:
    inner: an optax transformation, such as optax.adamw(1e-3) or optax.lion(1e-4).
    block: numbers under one absmax; 2048 in the paper, 256 in its authors' library today.
    smallest: moments of fewer numbers stay in float32.
    maps: {name of a moment: codebook}, MAPS if not given.

  >>> eight_bit(optax.adam(1e-3)).init(jax.numpy.ones((64, 64)))[0].mu.codes.dtype
  dtype('uint8')
  """
  specs = {name: qarray.Spec(book, Flat(block)) for name, book in (maps or MAPS).items()}

  def encode(path, x):
    spec = next((specs[k.name] for k in path if getattr(k, 'name', None) in specs), None)
    return x if spec is None or x.size < smallest else qarray.encode(x, spec)

  def init(params):
    return jax.tree_util.tree_map_with_path(encode, inner.init(params))

  def update(updates, state, params=None):
    updates, moved = inner.update(updates, jax.tree.map(_decoded, state, is_leaf=_is_codes), params)
    return updates, jax.tree_util.tree_map_with_path(encode, moved)

  return optax.GradientTransformation(init, update)


def _is_codes(x):
  return isinstance(x, qarray.QArray)


def _decoded(x):
  return qarray.decode(x) if _is_codes(x) else x
