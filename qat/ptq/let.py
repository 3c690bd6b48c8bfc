"""LET: learn the scales and shifts that move difficulty from activations into weights.

Shao et al. OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models, ICLR 2024, Sec. 3.3.
https://arxiv.org/abs/2308.13137. Y = ((X - delta) / s) (diag(s) W) + (b + delta W) (Eq. 3), with s and delta learned on
the error of a block's outputs. Its other half, learned clipping, is qat/quantizers/lwc.py.

Differences from the paper: s is learned by its logarithm, so that it stays above 0; queries and keys get no factors of
their own; a link is shifted only where its source has an offset, as LayerNorm has and RMSNorm has not (the paper's
code gives RMSNorm one).
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qat.ptq import channels, links as links_

# The paper's, for s and delta.
LEARNING_RATE = 5e-3


def learn(block, links, batches, quantize, scales=None, epochs=20, lr=LEARNING_RATE, apply=None):
  """A copy of `block` with the same outputs, whose quantized form has outputs closer to them.

  Args:
    block: a float model or a block of one, in evaluation mode where that matters.
    links: of `links.find` or `links.resolve`.
    batches: a list of what `apply` takes.
    quantize: block -> its quantized form, whose rounding hands gradients on: `lambda b: qat.quantize(b, recipe)`.
    scales: {link: f32[*lead, channels]} to start from; 1 if not given. `smooth.factors` are the paper's.
    epochs, lr: passes over the batches, and the learning rate of Adam. The paper takes 20 and 5e-3.
    apply: (block, batch) -> an array; `block(batch)` if not given.

  Returns:
    The block of the least mean error over an epoch's batches, that of the start included, and the errors: a list
    of floats, the first before learning.
  """
  channels.refuse_quantized(block, 'let.learn')
  batches, apply = list(batches), apply or (lambda block, batch: block(batch))
  if not batches or not links:
    raise ValueError(f'let.learn was given {len(batches)} batches and {len(links)} links: there is nothing to learn '
                     'from, or nothing to learn. Give at least one of each.')
  start = {link: (scales or {}).get(link, jnp.ones(links_.size(block, link))) for link in links}
  # One array a link; a link itself is no key that sorts.
  variables = ([jnp.log(jnp.asarray(start[link], jnp.float32)) for link in links],
               [jnp.zeros(links_.size(block, link)) for link in links if _has_offset(block, link)])
  moved = functools.partial(_moved, links=tuple(links))
  optimizer = optax.adam(lr)

  def error(variables, block, batch, target):
    return jnp.mean((apply(quantize(moved(block, variables)), batch) - target) ** 2)

  measure = nnx.jit(error)

  @nnx.jit
  def step(variables, state, block, batch, target):
    gradients = jax.grad(error)(variables, block, batch, target)
    with jax.numpy_dtype_promotion('standard'):  # optax's Adam raises a float to an integer.
      updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(variables, updates), state

  call = nnx.jit(apply)
  targets = [call(nnx.clone(block), batch) for batch in batches]
  mean = lambda v: float(np.mean([measure(v, nnx.clone(block), *pair) for pair in zip(batches, targets)]))
  best, state, errors = variables, optimizer.init(variables), [mean(variables)]
  for _ in range(epochs):
    for batch, target in zip(batches, targets):
      variables, state = step(variables, state, nnx.clone(block), batch, target)
    errors.append(mean(variables))
    if errors[-1] < min(errors[:-1]):
      best = variables
  return moved(block, best), errors


def _has_offset(block, link):
  """Whether a shift can move from the targets of `link` into its source."""
  source = channels.find(block, link.source)
  held = isinstance(source, channels.NORMS) and vars(source).get('bias') is not None
  convs = [t for t in link.targets if isinstance(channels.find(block, t), channels.CONVS)]
  return held and not convs  # A convolution pads with zeros, which are not shifted.


def _moved(block, variables, links):
  """The block under scales exp(log_s) and shifts."""
  logs, shifts = variables
  shifted = [link for link in links if _has_offset(block, link)]
  return links_.rescale(block, {link: jnp.exp(a) for link, a in zip(links, logs)}, dict(zip(shifted, shifts)))
