"""Rotations leave the outputs as they are, and outliers nowhere."""

import functools
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import hadamard, specs
from qat.ptq import channels, links, online, rotate, smooth
from qat.quantizers import static
from qat.quantizers.ste import STE
from tests.ptq import tiny

HEAD_DIMS = dict(gpt=12, llama=8)
run = nnx.jit(lambda m, x: m(x))


@functools.cache
def folded(form, tied_head):
  model = getattr(tiny, form)(tied_head=tied_head)
  stream = rotate.resolve(model, rotate.TIED_DECODER if tied_head else rotate.DECODER, tiny.TOKENS)
  return (model, *rotate.fold_norms(model, stream))


forms = pytest.mark.parametrize(('form', 'tied_head'), [*itertools.product(['gpt', 'llama'], [True, False])])


@forms
def test_folded_norms(form, tied_head):
  model, other, stream = folded(form, tied_head)
  assert links.distance(model, other, tiny.TOKENS) < 1e-5
  for link in stream.norms:
    norm = channels.find(other, link.source)
    assert type(norm) is nnx.RMSNorm
    np.testing.assert_array_equal(norm.scale[...], 1)
  assert type(model.norm) in (nnx.LayerNorm, nnx.RMSNorm)


@forms
def test_r1(form, tied_head):
  model, other, stream = folded(form, tied_head)
  r1 = hadamard.randomized(jax.random.key(0), 24)
  turned = rotate.rotate_stream(other, stream, r1)
  assert links.distance(model, turned, tiny.TOKENS) < 1e-5
  np.testing.assert_allclose(run(turned.embed, tiny.TOKENS), run(other.embed, tiny.TOKENS) @ r1, atol=1e-5)
  assert (turned.blocks[1].attention.q.kernel[...] != other.blocks[1].attention.q.kernel[...]).any()
  assert hasattr(turned, 'head') != tied_head


def test_writers_of_a_layer_norm_are_centered():
  _, other, _ = folded('gpt', False)
  down = other.blocks[1].ffn.down
  for a in (other.embed.embedding, other.position.embedding, down.kernel, down.bias):
    np.testing.assert_allclose(a[...].mean(-1), 0, atol=1e-6)


def test_outliers_of_the_stream_are_spread():
  model, other, stream = folded('llama', False)
  spike = nnx.clone(other)
  spike.embed.embedding[...] = spike.embed.embedding[...].at[:, 3].add(20.0)
  turned = rotate.rotate_stream(spike, stream, hadamard.randomized(jax.random.key(0), 24))
  crest = lambda m: jnp.max(jnp.abs(m.embed.embedding[...])) / jnp.sqrt(jnp.mean(m.embed.embedding[...] ** 2))
  assert crest(turned) < crest(spike) / 2


@pytest.mark.parametrize('form', ['gpt', 'llama', 'bert'])
def test_r2(form):
  model = getattr(tiny, form)()
  d = HEAD_DIMS.get(form, 12)
  found = links.resolve(model, links.heads(d), tiny.TOKENS)
  r2 = jax.random.orthogonal(jax.random.key(1), d)
  other = rotate.rotate_heads(model, found, r2)
  assert links.distance(model, other, tiny.TOKENS) < 1e-5
  v, w = (m.blocks[0].attention.v.kernel[...].reshape(24, -1, d) for m in (model, other))
  np.testing.assert_allclose(v @ r2, w, atol=1e-5)
  one = rotate.rotate_heads(model, found, {link: r2 for link in found})
  np.testing.assert_array_equal(one.blocks[1].attention.o.kernel[...], other.blocks[1].attention.o.kernel[...])


@pytest.mark.parametrize('form', ['gpt', 'llama', 'bert'])
def test_r3_and_r4(form):
  model = getattr(tiny, form)()
  scores = rotate.rotate_scores(model, r'blocks/\d+/attention')
  assert links.distance(model, scores, tiny.TOKENS) < 1e-5
  inputs = rotate.rotate_inputs(model)
  assert links.distance(model, inputs, tiny.TOKENS) < 1e-5
  down = inputs.blocks[0].ffn.down
  assert isinstance(down, nnx.Linear) and isinstance(down.before, online.Hadamard)
  n = down.kernel[...].shape[0]
  before = model.blocks[0].ffn.down.kernel[...]
  np.testing.assert_allclose(down.kernel[...], hadamard.orthonormal(n).T @ before, atol=1e-5)


def everything():
  model, other, stream = folded('llama', True)
  turned = rotate.rotate_stream(other, stream, hadamard.randomized(jax.random.key(0), 24))
  turned = rotate.rotate_heads(turned, links.resolve(turned, links.heads(8), tiny.TOKENS), hadamard.orthonormal(8))
  return model, rotate.rotate_inputs(rotate.rotate_scores(turned), r'.*(ffn/down|attention/o)')


def test_all_rotations_train_as_they_serve():
  model, turned = everything()
  assert links.distance(model, turned, tiny.TOKENS) < 1e-5
  token = STE(specs.integer(8, specs.TOKEN))
  recipe = [qat.Rule('blocks/.*', STE(specs.integer(8, specs.CHANNEL)), static.Static(specs.integer(8, specs.TENSOR)),
                     kind='.*Linear'), qat.Rule('.*', scores=token, kind='Attention'),
            qat.Rule('norm/mix', STE(specs.integer(8, specs.CHANNEL)), token),
            qat.Rule('embed', STE(specs.integer(8, specs.CHANNEL)), token)]
  quantized = qat.calibrate(qat.quantize(turned, recipe), [tiny.TOKENS])
  assert 1e-4 < links.distance(model, quantized, tiny.TOKENS) < 0.1
  assert links.distance(quantized, qat.freeze(quantized), tiny.TOKENS) < 1e-6
  seen = smooth.largest(turned, ['blocks/0/ffn/down'], [tiny.TOKENS])['blocks/0/ffn/down']
  attention = quantized.blocks[0].attention
  assert isinstance(attention.attention_fn, rotate.RotatedScores)
  scale = vars(quantized.blocks[0].ffn.down)['quantizers'].input.scale.get_value()
  np.testing.assert_allclose(scale * 127, seen.max(), rtol=0.05)          # The range is that of what was turned.


def test_scores_are_quantized_after_they_are_turned():
  """An outlier of keys takes the whole range of a token, unless it is turned away first."""
  model = nnx.clone(tiny.bert())
  for block in model.blocks:
    block.attention.k.bias[...] = block.attention.k.bias[...].at[::12].add(30.0)
  recipe = [qat.Rule('.*', scores=STE(specs.integer(4, specs.TOKEN)), kind='Attention'), qat.Rule('.*')]
  wrong = lambda m: links.distance(model, qat.quantize(m, recipe), tiny.TOKENS)
  assert wrong(rotate.rotate_scores(model)) < 0.9 * wrong(model)


def test_a_post_norm_stream_cannot_be_rotated():
  stream = rotate.Stream((r'blocks/\d+/(attention/o|ffn/down)',),
                         (links.Link(r'(blocks/\d+)/attention_norm', (r'\1/ffn/up',)),))
  with pytest.raises(ValueError, match=r'cannot be rotated.*post-norm.*blocks/0/attention_norm'):
    rotate.resolve(tiny.bert(), stream, tiny.TOKENS)


def test_errors():
  model, other, stream = folded('llama', False)
  with pytest.raises(ValueError, match=r'r1 has shape \(8, 8\), and turns 24'):
    rotate.rotate_stream(other, stream, jnp.eye(8))
  with pytest.raises(ValueError, match='r1 is no rotation'):
    rotate.rotate_stream(other, stream, jnp.full((24, 24), jnp.nan))
  with pytest.raises(ValueError, match='matches the writers'):
    rotate.resolve(model, rotate.Stream(('x',), ()), tiny.TOKENS)
  with pytest.raises(ValueError, match="No attention matches 'x'"):
    rotate.rotate_scores(model, 'x')
  with pytest.raises(ValueError, match='rotated already'):
    rotate.rotate_scores(rotate.rotate_scores(model))
  with pytest.raises(ValueError, match="'blocks', a List|'blocks' "):
    rotate.rotate_inputs(model, 'blocks')
  with pytest.raises(ValueError, match='changed already'):
    rotate.rotate_inputs(rotate.rotate_inputs(model))
  odd = tiny.llama(ffn_width=42)
  with pytest.raises(ValueError, match="Layer 'blocks/0/ffn/down': No Hadamard matrix of order 42"):
    rotate.rotate_inputs(odd)
