"""SmoothQuant: move the outliers of activations into the weights, where they do less harm.

Xiao et al. SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, ICML 2023.
https://arxiv.org/abs/2211.10438

Differences from the paper: channels that were never seen to differ from 0, in inputs or weights, keep the factor 1,
where the paper's code would give them 1e-5; besides norms, any link may carry the factors (qat/ptq/links.py).
`smooth_inputs` divides at the layer's door where no norm can, as after a norm whose output is also added to the stream.
"""

from flax import nnx
import jax.numpy as jnp

from qat.nn import quantized, rules
from qat.ptq import channels, links as links_, online

# The paper's code, smooth.py.
LEAST = 1e-5


def factors(x, w, alpha=0.5):
  """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (Eq. 4), which X is divided by and W multiplied.

  Args:
    x: f32[..., i], max|X_j|.
    w: f32[..., i], max|W_j| over all layers that read X.
    alpha: in [0, 1]: how much of the difficulty moves to the weights; 0.5 halves it, 0.8 or 0.9 is used where
      activations are wilder.

  Returns:
    f32[..., i], no less than 1e-5.
  """
  s = jnp.maximum(x, LEAST) ** alpha / jnp.maximum(w, LEAST) ** (1 - alpha)
  return jnp.where((x > 0) & (w > 0), jnp.maximum(s, LEAST), jnp.ones_like(s))


def smooth(model, largest, links, alpha=0.5):
  """A copy of `model` with the same outputs and smoother inputs of the links' targets.

  Args:
    model: a float model.
    largest: {layer's path: f32[*lead, k]}, max |x| of each input of the targets; `Moments.largest`, or `largest` below.
    links: of `links.find` or `links.resolve`.
    alpha: see `factors`.

  Returns:
    A model of the same class.
  """
  _check_alpha(alpha)
  for link in links:
    shape, modules = links_.size(model, link), {path: channels.find(model, path) for path in link.targets}
    gather = lambda a: links_.gather(a, shape[-1], link.run)
    x = [gather(_seen(largest, path)) for path in link.targets]
    w = [gather(_rows(module, path)) for path, module in modules.items()]
    s = factors(jnp.max(jnp.stack(x), 0), jnp.max(jnp.stack(w), 0), alpha)
    model = links_.rescale(model, {link: s})
  return model


def smooth_inputs(model, largest, layers, alpha=0.5):
  """The same for single Linear layers, which then divide their inputs themselves (qat/ptq/online.py).

  Args:
    model, largest, alpha: as for `smooth`.
    layers: paths.
  """
  _check_alpha(alpha)
  channels.refuse_quantized(model, 'smooth_inputs')
  model = nnx.clone(model)
  for path in layers:
    layer = channels.find(model, path)
    s = factors(_seen(largest, path), _rows(layer, path), alpha)
    online.insert(layer, online.Divide(s), lambda m: m * s[..., :, None], path)
  return model


class Largest(nnx.Variable):
  """The running max |x|: f32[*lead, k]."""


class Watch(nnx.Module):
  """Stands in an input quantizer's place."""

  def __init__(self, shape):
    self.seen = Largest(jnp.zeros(shape))

  def __call__(self, x):
    now = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))
    self.seen.set_value(jnp.maximum(self.seen.get_value(), now))
    return x

  def advance(self):
    """Draws nothing at random."""


def largest(model, layers, batches, apply=None):
  """max |x| of each input of some layers.

  Args:
    model: a float model, which is run in evaluation mode.
    layers: paths.
    batches: an iterable of what `apply` takes.
    apply: (model, batch) -> anything; `model(batch)` if not given.

  Returns:
    {path: f32[*lead, k]}.
  """
  channels.refuse_quantized(model, 'smooth.largest')
  apply = apply or (lambda model, batch: model(batch))
  watched = nnx.clone(model)
  sites = {site.path: site for site in rules.sites(watched)}
  for path in layers:
    layer = channels.find(watched, path)
    shape = (*sites[path].lead, channels.input_rows(layer, path))
    quantized.attach(layer, path, sites[path].lead).input = Watch(shape)
  watched.eval()

  @nnx.jit
  def step(model, batch):
    apply(model, batch)

  for batch in batches:
    step(watched, batch)
  found = {path: quantized.of(channels.find(watched, path)).input.seen.get_value() for path in layers}
  if dead := [path for path, x in found.items() if not jnp.any(x > 0)]:
    raise ValueError(f'No batch brought a number other than 0 to {dead}. Check the batches, or leave these layers out.')
  return found


def _rows(layer, path):
  """max|W_j| of each input channel: f32[*lead, k]."""
  return jnp.max(jnp.abs(channels.inputs(layer, path)), -1)


def _seen(largest, path):
  if path not in largest:
    raise ValueError(f"No max |x| is given for '{path}', of {list(largest)}. Give one for each layer that is smoothed: "
                     'smooth.largest(model, layers, batches) finds them.')
  return jnp.asarray(largest[path], jnp.float32)


def _check_alpha(alpha):
  if not 0 <= alpha <= 1:
    raise ValueError(f'alpha {alpha}: it is the share of the difficulty that moves to the weights, between 0 and 1. '
                     '0.5 is usual.')
