"""Inputs whose outlier columns stay in floats: LLM.int8().

Dettmers et al. LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, NeurIPS 2022, Sec. 3.
https://arxiv.org/abs/2208.07339

Differences from the paper: any quantizer for the other columns; a column that stays in floats meets the weight on its
grid, as in the authors' inference from int8 checkpoints, where the paper has that row of the weight in float16. The
product of int8 alone, with the paper's rows, is qat/ptq/llm_int8.py.
"""

from flax import nnx
import jax.numpy as jnp

THRESHOLD = 6.0  # Sec. 3.2


def is_outlier(x, threshold=THRESHOLD):
  """Which columns of float[..., k] hold a number of |x| >= threshold: bool[1, ..., k]."""
  return jnp.any(jnp.abs(x) >= threshold, axis=tuple(range(x.ndim - 1)), keepdims=True)


class KeepOutliers(nnx.Module):
  """Any dynamic quantizer of inputs, but for outlier columns. It has no codes for these: products take its floats."""

  observer = None

  def __init__(self, quantizer, threshold=THRESHOLD):
    """`quantizer`: one that needs no calibration, such as STE. The range of each of its blocks is without outliers."""
    if quantizer.observer is not None:
      raise ValueError(f'KeepOutliers({type(quantizer).__name__}): its range is calibrated, with the outliers that are '
                       'to stay out of it. Use a quantizer that finds ranges anew for each batch, such as STE.')
    self.quantizer, self.threshold = quantizer, threshold

  spec = property(lambda self: self.quantizer.spec)

  def __call__(self, x):
    kept = is_outlier(x, self.threshold)
    inside = self.quantizer(jnp.where(kept, jnp.zeros_like(x), x))       # Outliers have no part in ranges.
    return jnp.where(kept, x, inside)

  def for_input(self, lead, scale=None, zero=None):
    return KeepOutliers(self.quantizer.for_input(lead, scale, zero), self.threshold)

  def advance(self):
    self.quantizer.advance()

  def relaxed(self):
    return self

  def settled(self):
    return self

  def penalty(self, progress):
    return self.quantizer.penalty(progress)

  def frozen(self):
    return nnx.clone(self)
