"""Links: which module makes the channels that which layers read, so that a change of one can be undone in the others.

If Y = f(s X) W, and f hands each channel's factor on, then Y = f(X) diag(s) W: a scale may move from the producer of
X into the input rows of W (Xiao et al. SmoothQuant, 2023, Eq. 3; Nagel et al. Data-Free Quantization, 2019, Sec. 4.1).

The links of norms to linear layers are found by tracing a model. What tracing cannot see is given as a value, by
regular expressions:

    GATED                 ffn/up -> ffn/down, through silu(gate) * up
    heads(head_dim)       attention/v -> attention/o, through attention: weights of the values sum over positions
    Link('(.*)/conv1', (r'\\1/conv2',))   through a relu, which hands positive factors on

Every link is checked on the model's own outputs, with factors that are powers of two: these change no bit, so that
what does move is a link that is wrong.
"""

import collections
import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import calls, quantized
from qat.ptq import channels

READERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)
# How far factors of powers of two may move outputs, as a share of the largest: they should not at all.
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Link:
  """`targets` read, channel for channel, what `source` makes.

  Attributes:
    source: path of a norm or a layer, or a regular expression for paths.
    targets: likewise of layers; they may refer to the groups of `source`.
    run: where a target has n times as many inputs as there are channels, each run of `run` channels is read n times
      in succession; of all channels if None. The heads of a value that queries share: head_dim.
  """
  source: str
  targets: tuple[str, ...]
  run: int | None = None

  def __post_init__(self):
    if isinstance(self.targets, str):
      raise TypeError(f'Link.targets {self.targets!r} is one string, and no tuple of paths. Write ({self.targets!r},).')


GATED = Link(r'(.*)ffn/up', (r'\1ffn/down',))


def heads(head_dim):
  """attention/v -> attention/o; query heads may share a value (Ainslie et al. 2023, GQA)."""
  return Link(r'(.*)attention/v', (r'\1attention/o',), head_dim)


def find(model, *args, **kwargs):
  """The links from norms to the layers that read exactly their outputs, and are the only ones that do.

  Args:
    model: a float model.
    *args, **kwargs: what it is called with, as arrays. It is traced in evaluation mode.

  Returns:
    tuple of Link, in the order of calls.
  """
  channels.refuse_quantized(model, 'links.find')
  links = _candidates(model, args, kwargs)
  if links and _moved(model, links, args, kwargs) <= TOLERANCE:
    return links
  return tuple(link for link in links if _moved(model, (link,), args, kwargs) <= TOLERANCE)


def resolve(model, patterns, *args, **kwargs):
  """The links that `patterns` stand for in `model`, each checked.

  Args:
    model: a float model.
    patterns: Links, whose paths are regular expressions.
    *args, **kwargs: what the model is called with, as arrays.

  Returns:
    tuple of Link with plain paths.
  """
  channels.refuse_quantized(model, 'links.resolve')
  patterns = (patterns,) if isinstance(patterns, Link) else tuple(patterns)
  links = tuple(link for pattern in patterns for link in expand(model, pattern))
  for link in links:
    size(model, link)
  if links and not _moved(model, links, args, kwargs) <= TOLERANCE:
    _refuse(model, links, args, kwargs)
  return links


def expand(model, pattern):
  """The links with plain paths that a pattern stands for."""
  paths = [path for path, _ in quantized.walk(model)]
  found = []
  for match in filter(None, (re.fullmatch(pattern.source, path) for path in paths)):
    targets = [match.expand(target) for target in pattern.targets]
    matched = {t: [path for path in paths if re.fullmatch(t, path)] for t in targets}
    if missing := [t for t, hits in matched.items() if not hits]:
      raise ValueError(f"{pattern}: '{match[0]}' should feed {missing}, and no module has such a path. The paths are "
                       f'{paths}.')
    found.append(Link(match[0], tuple(dict.fromkeys(p for hits in matched.values() for p in hits)), pattern.run))
  if not found:
    raise ValueError(f'{pattern}: no path matches its source. The paths are {paths}.')
  return tuple(found)


def size(model, link):
  """(*lead, channels) that a link's scales have; raises if a target cannot read these channels."""
  shape = channels.shape(channels.find(model, link.source), link.source)
  for path in link.targets:
    rows = channels.input_rows(channels.find(model, path), path)
    run = link.run or shape[-1]
    if rows % shape[-1] or shape[-1] % run:
      raise ValueError(f"{link}: '{link.source}' makes {shape[-1]} channels, and '{path}' reads {rows}, which is not a "
                       f'number of times as many in runs of {run}. Link layers of which one reads the other.')
  return shape


def rescale(model, scales, shifts=None):
  """A copy of `model` with the same outputs, in which targets read (x - shift) / scale in place of x.

  Args:
    model: a float model.
    scales: {link: f32[*lead, channels]}, nowhere 0. Links must hold in `model`: those of `find` and `resolve` do.
    shifts: {link: f32[*lead, channels]}, for links to whose targets every row is the source's own.

  Returns:
    A model of the same class.
  """
  channels.refuse_quantized(model, 'links.rescale')
  scales, shifts = ({link: _of_size(model, link, a) for link, a in (given or {}).items()} for given in (scales, shifts))
  model = nnx.clone(model)
  modules = dict(quantized.walk(model))
  for link, z in shifts.items():                                         # b' = b + z W
    channels.add_to_bias(modules[link.source], -z, link.source)
    for path in link.targets:
      w = channels.inputs(modules[path], path)
      wide = spread(z, w.shape[-2], link.run)
      channels.add_to_bias(modules[path], jnp.einsum('...i,...io->...o', wide, w, precision='highest'), path)
  for link, s in scales.items():
    channels.map_outputs(modules[link.source], lambda m: m / s[..., None, :], link.source)
    for path in link.targets:
      channels.map_inputs(modules[path], lambda m: m * spread(s, m.shape[-2], link.run)[..., :, None], path)
  return model


def _of_size(model, link, a):
  """A scale or a shift in f32; raises if it is not one number a channel."""
  shape, a = size(model, link), jnp.asarray(a, jnp.float32)
  if a.shape != shape:
    raise ValueError(f"{link} has {shape} channels, and is given numbers of shape {a.shape}. Give one to each channel.")
  return a


def spread(s, rows, run=None):
  """What each input row of a target gets: [*lead, channels] -> [*lead, rows]."""
  count = s.shape[-1]
  run = run or count
  s = s.reshape(*s.shape[:-1], count // run, 1, run)
  return jnp.broadcast_to(s, (*s.shape[:-2], rows // count, run)).reshape(*s.shape[:-3], rows)


def gather(x, count, run=None, reduce=jnp.max):
  """Reduces over the rows that read a channel: [*lead, rows] -> [*lead, channels]."""
  run = run or count
  x = x.reshape(*x.shape[:-1], count // run, x.shape[-1] // count, run)
  return reduce(x, axis=-2).reshape(*x.shape[:-3], count)


def distance(model, other, *args, **kwargs):
  """How far the outputs of `other` are from those of `model`, as a share of the largest, in evaluation mode."""
  f64 = lambda m: [np.asarray(y, np.float64) for y in jax.tree.leaves(_run(nnx.clone(m), args, kwargs))]
  share = lambda y, z: np.max(np.abs(z - y), initial=0) / max(np.max(np.abs(y), initial=0), 1e-30)
  return float(np.max([share(y, z) for y, z in zip(f64(model), f64(other))]))  # NaN, if there is one.


@nnx.jit
def _run(model, args, kwargs):
  model.eval()
  return model(*args, **kwargs)


def _candidates(model, args, kwargs):
  """Links from each norm that is called once to the layers called once, on what it returned."""
  log = calls.trace(model, lambda model, batch: model(*batch[0], **batch[1]), (args, kwargs))
  count = collections.Counter(call.path for call in log)
  log = [call for call in log if count[call.path] == 1]
  readers = collections.defaultdict(list)
  for call in log:
    if issubclass(call.cls, READERS) and call.args:
      readers[id(call.args[0])].append(call.path)
  made = [(call.path, call.result) for call in log if issubclass(call.cls, channels.NORMS)]
  links = [Link(path, tuple(readers[id(y)])) for path, y in made if readers[id(y)]]
  return tuple(link for link in links if _fits(model, link))


def _fits(model, link):
  try:
    size(model, link)
  except ValueError:
    return False
  return True


def _moved(model, links, args, kwargs):
  """How far the outputs move if the channels of `links` are scaled by powers of two."""
  draw = np.random.default_rng(0)
  factor = lambda link: jnp.asarray(2.0 ** draw.integers(-2, 3, size(model, link)), jnp.float32)
  return distance(model, rescale(model, {link: factor(link) for link in links}), *args, **kwargs)


def _refuse(model, links, args, kwargs):
  """The error of links of which some are wrong."""
  moved = {link: _moved(model, (link,), args, kwargs) for link in links}
  wrong = [f'{link} (by {moved[link]:.2g} of the largest)' for link in links if not moved[link] <= TOLERANCE]
  raise ValueError(f'Scaling the channels of {"; ".join(wrong)} moves the outputs: something else reads what the '
                   'source makes, or shares a weight of these layers, or what lies between hands no factor on (gelu '
                   'and silu do not; relu, a product and a sum over positions do). Leave the link out.')
