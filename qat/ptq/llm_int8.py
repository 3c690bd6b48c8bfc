"""LLM.int8(): columns of the inputs that hold an outlier stay in floats; the rest is a product of int8.

Dettmers et al. LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, NeurIPS 2022, Sec. 3.
https://arxiv.org/abs/2208.07339

Differences from the paper: floats are those of x, and not float16; a column that stays is a column of zeros in the int8
product, and the reverse, so that shapes do not depend on the numbers.
"""

import functools

import jax
import jax.numpy as jnp

from qat.core import formats, qarray, specs

THRESHOLD = 6.0  # Sec. 3.2
TOKEN = qarray.Spec(formats.INT8_NARROW, specs.TOKEN)
CHANNEL = qarray.Spec(formats.INT8_NARROW, specs.CHANNEL)


@functools.partial(jax.jit, static_argnames='threshold')
def matmul(x, w, threshold=THRESHOLD):
  """x @ w in int8, but for the columns of x that hold a number of |x| >= threshold.

  Args:
    x: float[n, i].
    w: float[i, o].
    threshold: 0 keeps all columns, and infinity none: then it is vector-wise quantization.

  Returns:
    float[n, o], and bool[i], the columns that stayed in floats.
  """
  kept = outliers(x, threshold)
  float_part = jnp.where(kept[None], x, jnp.zeros_like(x)) @ jnp.where(kept[:, None], w, jnp.zeros_like(w))
  a = qarray.encode(jnp.where(kept[None], jnp.zeros_like(x), x), TOKEN)    # scales: max|row of x| / 127
  b = qarray.encode(jnp.where(kept[:, None], jnp.zeros_like(w), w), CHANNEL)  # and max|column of w| / 127
  product = jax.lax.dot(a.codes, b.codes, preferred_element_type=jnp.int32)
  return float_part + (product.astype(jnp.float32) * a.scale * b.scale).astype(x.dtype), kept


def outliers(x, threshold=THRESHOLD):
  """The columns of f32[n, i] that hold a number of |x| >= threshold: bool[i]."""
  return jnp.any(jnp.abs(x) >= threshold, axis=0)


def bits_per_weight(kept, float_bits=16):
  """Of a weight of which the rows bool[i] are in floats and the rest in int8, with a float scale an output: f32[]."""
  return 8 + (float_bits - 8) * jnp.mean(kept.astype(jnp.float32)) + float_bits / len(kept)
