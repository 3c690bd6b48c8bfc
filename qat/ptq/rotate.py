"""Rotations: turn the residual stream, the values, the scores and the inputs of down, so that no channel stands out.

Ashkboos et al. QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024. https://arxiv.org/abs/2404.00456
Liu et al. SpinQuant: LLM Quantization with Learned Rotations, 2024. https://arxiv.org/abs/2405.16406 (whose names
R1 to R4 are used). That a norm commutes with a rotation, and how a LayerNorm is made an RMSNorm: Ashkboos et al.
SliceGPT, ICLR 2024, Sec. 3. https://arxiv.org/abs/2401.15024

    R1   rotate_stream   the residual stream; fused into the weights that write to it and read it
    R2   rotate_heads    the values of each head; fused into v and o
    R3   rotate_scores   queries and keys after RoPE; online, by a Hadamard transform
    R4   rotate_inputs   the inputs of down, or of any linear layer; online, and its inverse fused into the layer

    stream = rotate.resolve(model, rotate.TIED_DECODER, tokens)
    model, stream = rotate.fold_norms(model, stream)
    model = rotate.rotate_stream(model, stream, hadamard.randomized(key, width))

Differences from the papers: a head that is tied to the embedding stays tied. The gain of its norm, which no
rotation passes, becomes a matrix R1^T diag(gain) R1 of a layer `mix` after it (the papers' code unties the head, which
for a small model costs more); and where that norm is a LayerNorm, the embedding, which cannot be centered for one of
its readers alone, is centered as it is looked up.
"""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.core import hadamard
from qat.nn import quantized
from qat.ptq import channels, links as links_, online
from qat.ptq.links import Link

# f32 matrices R whose R R^T differs from I by more are no rotations.
ORTHOGONAL = 1e-4


@dataclasses.dataclass(frozen=True)
class Stream:
  """Who writes to a residual stream, and who reads it.

  Attributes:
    writers: paths of the layers and embeddings whose outputs are added up, as regular expressions.
    norms: Links from each norm of the stream to what reads it. An Embed among the targets is a tied head.
  """
  writers: tuple[str, ...]
  norms: tuple[Link, ...]


_WRITERS = (r'embed|position', r'blocks/\d+/(attention/o|ffn/down)')
_NORMS = (Link(r'(blocks/\d+)/attention_norm', (r'\1/attention/(q|k|v)',)),
          Link(r'(blocks/\d+)/ffn_norm', (r'\1/ffn/(gate|up)',)))
# Of qat.models.decoder, in all its forms.
DECODER = Stream(_WRITERS, (*_NORMS, Link('norm', ('head',))))
TIED_DECODER = Stream(_WRITERS, (*_NORMS, Link('norm', ('embed',))))


def resolve(model, stream, *args, **kwargs):
  """The Stream of `model` with plain paths, whose norms were checked to be read by their targets alone.

  Args:
    model: a float model.
    stream: paths as regular expressions.
    *args, **kwargs: what the model is called with, as arrays.
  """
  channels.refuse_quantized(model, 'rotate.resolve')
  modules = dict(quantized.walk(model))
  writers = [path for path in modules for writer in stream.writers if path and re.fullmatch(writer, path)]
  if not writers:
    raise ValueError(f'{stream.writers}: no path matches the writers of the stream. The paths are {list(modules)}.')
  norms = tuple(link for pattern in stream.norms for link in links_.expand(model, pattern))
  untied = tuple(link for link in norms if not _is_tied(modules, link))
  try:
    links_.resolve(model, untied, *args, **kwargs)
  except ValueError as e:
    raise ValueError('The stream cannot be rotated: a rotation passes a norm only if its gain can go into the layers '
                     'that read it, and here something else reads the norm as well, as where the stream itself is '
                     f'normalized (post-norm: BERT). Rotate values and inputs (R2, R4) instead. {e}') from e
  for link in norms:
    if not isinstance(modules[link.source], (nnx.RMSNorm, nnx.LayerNorm)):
      raise ValueError(f"'{link.source}' is a {type(modules[link.source]).__name__}: only RMSNorm and LayerNorm "
                       'commute with rotations. Leave the stream as it is.')
  return Stream(tuple(dict.fromkeys(writers)), norms)


def fold_norms(model, stream):
  """A copy of `model` with the same outputs, whose norms have no gain and no mean; and its Stream.

  Gains and offsets go into the readers. If the norms are LayerNorms, the mean goes out of what the writers write, and
  they become RMSNorms.

  Args:
    model: a float model.
    stream: of `resolve`.
  """
  channels.refuse_quantized(model, 'rotate.fold_norms')
  model = nnx.clone(model)
  modules = dict(quantized.walk(model))
  norms, tied, writers = [], [], list(stream.writers)
  centered = any(isinstance(modules[link.source], nnx.LayerNorm) for link in stream.norms)
  for link in stream.norms:
    if _is_tied(modules, link):
      tied += link.targets
      writers.append(f'{link.source}/mix')
      link = _mix(model, modules, link.source)
    norms.append(link)
  modules = dict(quantized.walk(model))
  if centered:
    for path in stream.writers:
      _center(modules[path], path, path in tied)
  gains = {link: _gain(modules[link.source]) for link in norms}
  offsets = {link: b for link in norms if (b := _offset(modules[link.source])) is not None}
  _absorb(model, gains, offsets)
  for link in norms:
    _replace(model, channels.find(model, link.source), _plain(channels.find(model, link.source)))
  return model, Stream(tuple(writers), tuple(norms))


def rotate_stream(model, stream, r1):
  """A copy of `model` with the same outputs, whose stream is x R1 in place of x. Of arrays, it is differentiable.

  Args:
    model: what `fold_norms` returned, and `stream` likewise.
    r1: f32[n, n], orthogonal: `hadamard.randomized(key, n)`, or `jax.random.orthogonal(key, n)`.
  """
  channels.refuse_quantized(model, 'rotate.rotate_stream')
  model = nnx.clone(model)
  modules = dict(quantized.walk(model))
  r1 = _checked(r1, channels.shape(modules[stream.writers[0]], stream.writers[0])[-1], 'r1')
  for link in stream.norms:
    for path in link.targets:
      channels.map_inputs(modules[path], lambda m: _product('nm,...no->...mo', r1, m), path)
  for path in stream.writers:
    channels.map_outputs(modules[path], lambda m: _product('...rn,nm->...rm', m, r1), path)
    if isinstance(modules[path], online.CenteredEmbed):
      modules[path].turn(r1)
  return model


def rotate_heads(model, links, r2):
  """A copy of `model` with the same outputs, whose values are v R2 in each head.

  Args:
    model: a float model.
    links: of `links.resolve(model, links.heads(head_dim), ...)`.
    r2: f32[d, d], orthogonal, for all links; or {link: f32[d, d]}.
  """
  channels.refuse_quantized(model, 'rotate.rotate_heads')
  model = nnx.clone(model)
  modules = dict(quantized.walk(model))
  for link in links:
    d = link.run or links_.size(model, link)[-1]
    r = _checked(r2[link] if isinstance(r2, dict) else r2, d, f'r2 of {link}')
    turn = lambda m: _product('...hn,nm->...hm', m.reshape(*m.shape[:-1], -1, d), r).reshape(m.shape)
    back = lambda m: jnp.swapaxes(turn(jnp.swapaxes(m, -1, -2)), -1, -2)  # (R2^T W) = (W^T R2)^T
    channels.map_outputs(modules[link.source], turn, link.source)
    for path in link.targets:
      channels.map_inputs(modules[path], back, path)
  return model


@dataclasses.dataclass(frozen=True)
class RotatedScores:
  """Attention on queries and keys that are turned by a Hadamard matrix: their products stay as they are.

  `around(scores)` is the same with quantizers of the operands, which see them turned.
  """
  attend: object

  def __call__(self, query, key, value, *args, **kwargs):
    return self.attend(hadamard.transform(query), hadamard.transform(key), value, *args, **kwargs)

  def around(self, scores):
    return RotatedScores(scores)

  def cache(self, *sizes):
    """That of the scores, which see keys turned; None if they have none of their own."""
    return self.attend.cache(*sizes) if hasattr(self.attend, 'cache') else None


def rotate_scores(model, pattern='.*'):
  """A copy of `model` with the same outputs, that turns queries and keys before their product (R3).

  Args:
    model: a float model, whose attention takes an `attention_fn`, after RoPE.
    pattern: of the paths of the modules that hold it, a regular expression.
  """
  channels.refuse_quantized(model, 'rotate.rotate_scores')
  model = nnx.clone(model)
  holders = {path: m for path, m in quantized.walk(model) if 'attention_fn' in vars(m)}
  chosen = [path for path in holders if re.fullmatch(pattern, path)]
  if not chosen:
    raise ValueError(f'No attention matches {pattern!r}. Those with an attention_fn are {list(holders)}.')
  for path in chosen:
    if isinstance(holders[path].attention_fn, RotatedScores):
      raise ValueError(f"'{path}' has scores that are rotated already. Do it once.")
    holders[path].attention_fn = RotatedScores(holders[path].attention_fn)
  return model


def rotate_inputs(model, pattern=r'.*ffn/down'):
  """A copy of `model` with the same outputs, in which some Linear layers turn their inputs by a Hadamard matrix (R4).

  Args:
    model: a float model.
    pattern: of the layers' paths, a regular expression.
  """
  channels.refuse_quantized(model, 'rotate.rotate_inputs')
  model = nnx.clone(model)
  chosen = {path: m for path, m in quantized.walk(model) if path and re.fullmatch(pattern, path)}
  if not chosen:
    raise ValueError(f'No layer matches {pattern!r}. The paths are {[path for path, _ in quantized.walk(model)]}.')
  inverse = lambda m: jnp.swapaxes(hadamard.transform(jnp.swapaxes(m, -1, -2)), -1, -2)  # H^T W = (W^T H)^T
  for path, layer in chosen.items():
    try:
      online.insert(layer, online.Hadamard(), inverse, path)
    except ValueError as e:
      raise ValueError(f"Layer '{path}': {e}") from e
  return model


class MixedNorm(nnx.Module):
  """A norm, and a layer that does what its gain and offset did before a tied head."""

  def __init__(self, norm, mix):
    self.norm, self.mix = norm, mix

  def __call__(self, x):
    return self.mix(self.norm(x))


def _is_tied(modules, link):
  tied = [path for path in link.targets if isinstance(modules[path], nnx.Embed)]
  if tied and len(link.targets) > 1:
    raise ValueError(f'{link}: {tied} is a tied head, and is not the only reader of its norm. Untie it.')
  return bool(tied)


def _mix(model, modules, path):
  """Puts an identity layer between a norm and a tied head, in place; the Link to it."""
  norm = modules[path]
  n = channels.shape(norm, path)[-1]
  mix = nnx.Linear(n, n, use_bias=isinstance(norm, nnx.LayerNorm), dtype=norm.dtype, rngs=nnx.Rngs(0))
  mix.kernel[...] = jnp.eye(n)
  _replace(model, norm, MixedNorm(norm, mix))
  return Link(f'{path}/norm', (f'{path}/mix',))


def _center(module, path, is_tied):
  """Takes the mean out of what a module adds to the stream, in place."""
  if is_tied:
    online.center(module)
  else:
    channels.map_outputs(module, lambda m: m - jnp.mean(m, -1, keepdims=True), path)


def _gain(norm):
  return norm.scale.get_value().astype(jnp.float32)


def _offset(norm):
  bias = vars(norm).get('bias')
  return None if bias is None else bias.get_value().astype(jnp.float32)


def _absorb(model, gains, offsets):
  """Moves gains and offsets of norms, which are to be replaced, into the layers that read them, in place."""
  for link, gain in gains.items():
    for path in link.targets:
      layer = channels.find(model, path)
      w = channels.inputs(layer, path)
      if link in offsets:
        wide = links_.spread(offsets[link], w.shape[-2], link.run)
        channels.add_to_bias(layer, _product('...i,...io->...o', wide, w), path)
      channels.map_inputs(layer, lambda m: m * links_.spread(gain, m.shape[-2], link.run)[..., :, None], path)


def _plain(norm):
  """The RMSNorm that is `norm` without gain, offset and mean."""
  shape = norm.scale.shape
  plain = nnx.RMSNorm(shape[-1], epsilon=norm.epsilon, dtype=norm.dtype, param_dtype=norm.param_dtype, rngs=nnx.Rngs(0))
  plain.scale = nnx.Param(jnp.ones(shape, norm.scale.dtype))
  return plain


def _replace(model, old, new):
  """Puts a module in the place of another, in place."""
  for _, module in list(quantized.walk(model)):
    for name, child in list(vars(module).items()):
      if child is old:
        setattr(module, name, new)


def _product(equation, *operands):
  return jnp.einsum(equation, *operands, precision='highest')


def _checked(r, n, name):
  """A rotation in f32; raises if it is none of n channels, where its numbers are known."""
  r = jnp.asarray(r, jnp.float32)
  if r.shape != (n, n):
    raise ValueError(f'{name} has shape {r.shape}, and turns {n} channels: give f32[{n}, {n}].')
  if not isinstance(r, jax.core.Tracer):
    wrong = np.abs(np.asarray(r, np.float64) @ np.asarray(r, np.float64).T - np.eye(n)).max()
    if not wrong <= ORTHOGONAL:
      raise ValueError(f'{name} is no rotation: R R^T differs from I by {wrong:.2g}. Give an orthogonal matrix, such '
                       'as hadamard.randomized(key, n).')
  return r
