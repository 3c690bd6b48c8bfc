"""Cross-layer equalization: give the channels between two layers equal ranges on both sides.

Nagel et al. Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019, Sec. 4.1.
https://arxiv.org/abs/1906.04721. Per-tensor grids then serve all channels alike. Fold BatchNorm first.

Differences from the paper: high biases are not absorbed (Sec. 4.1.3); channels of zeros stay as they are.
"""

import functools

from flax import nnx
import jax.numpy as jnp

from qat.nn import quantized
from qat.ptq import channels, links as links_

# Factors within 1 +- 1e-3 of the last sweep's change no range by more than a code of 8 bits.
CONVERGED = 1e-3


def factors(r1, r2):
  """s = (1 / r2) sqrt(r1 r2): r1 / s = r2 s.

  Args:
    r1: f32[c], the range of each output channel of the first layer, max|W1|.
    r2: f32[c], of each input channel of the second.

  Returns:
    f32[c], which the first is divided by and the second multiplied.
  """
  dead = (r1 == 0) | (r2 == 0)
  one = jnp.ones_like(r1)
  return jnp.where(dead, one, jnp.sqrt(jnp.where(dead, one, r1) / jnp.where(dead, one, r2)))


def equalize(model, links, steps=20):
  """A copy of `model` with the same outputs, whose links are equalized in turn until their factors settle at 1.

  Args:
    model: a float model.
    links: of `links.resolve`: a layer, and those that read it through relu or the identity.
    steps: how many sweeps there are at most.
  """
  channels.refuse_quantized(model, 'equalize')
  for link in links:
    links_.size(model, link)
  model = nnx.clone(model)
  for _ in range(steps):
    model, change = _sweep(model, tuple(links))
    if float(change) < CONVERGED:
      break
  return model


@functools.partial(nnx.jit, static_argnums=1)
def _sweep(model, links):
  change = jnp.float32(0)
  for link in links:
    modules = dict(quantized.walk(model))
    count = links_.size(model, link)[-1]
    of = lambda path: jnp.max(jnp.abs(channels.inputs(modules[path], path)), -1)
    r1 = jnp.max(jnp.abs(channels.outputs(modules[link.source], link.source)), -2)
    r2 = jnp.max(jnp.stack([links_.gather(of(path), count, link.run) for path in link.targets]), 0)
    s = factors(r1, r2)
    model = links_.rescale(model, {link: s})
    change = jnp.maximum(change, jnp.max(jnp.abs(jnp.log(s))))
  return model, change
