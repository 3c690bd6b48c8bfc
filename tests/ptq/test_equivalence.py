"""What is true of every equivalence: the float model's outputs stay within 1e-5 of the largest, the model given stays.

A new one joins with a line of MEMBERS.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import hadamard, specs
from qat.ptq import awq, equalize, links, rotate, smooth
from qat.ptq.moments import Moments
from tests.ptq import tiny

# What makes it, what it is called with, and the features of a head.
MODELS = {'gpt': (tiny.gpt, tiny.TOKENS, 12), 'llama': (tiny.llama, tiny.TOKENS, 8),
          'bert': (tiny.bert, tiny.TOKENS, 12), 'convs': (tiny.convs, tiny.IMAGES, None)}


@functools.cache
def found(name):
  """All links that a model has."""
  make, x, head_dim = MODELS[name]
  patterns = dict(gpt=[], llama=[links.GATED], bert=[], convs=[
      links.Link('blocks/0/conv', ('blocks/1/depthwise',)), links.Link('blocks/1/depthwise', ('blocks/1/pointwise',)),
      links.Link('blocks/1/pointwise', ('head',))])[name]
  patterns = patterns + [links.heads(head_dim)] * (head_dim is not None)
  return links.find(make(), x) + links.resolve(make(), patterns, x)


@functools.cache
def largest(name):
  make, x, _ = MODELS[name]
  return smooth.largest(make(), [t for link in found(name) for t in link.targets], [x])


def scaled(model, name):
  draw = lambda i, link: jnp.exp(jax.random.normal(jax.random.key(i), links.size(model, link)))
  return links.rescale(model, {link: draw(i, link) for i, link in enumerate(found(name))})


def searched(model, name):
  moments = {p: Moments(jnp.int32(1), jnp.diag(x * x), x, x) for p, x in largest(name).items()}
  return awq.awq(model, moments, found(name), specs.integer(3, specs.CHANNEL))[0]


def turned(model, name):
  stream = rotate.resolve(model, rotate.TIED_DECODER, MODELS[name][1])
  model, stream = rotate.fold_norms(model, stream)
  return rotate.rotate_stream(model, stream, hadamard.randomized(jax.random.key(0), 24))


def heads(model, name):
  values = [link for link in found(name) if link.source.endswith('/v')]
  return rotate.rotate_heads(model, values, jax.random.orthogonal(jax.random.key(0), MODELS[name][2]))


DECODERS, TRANSFORMERS, ALL = ('gpt', 'llama'), ('gpt', 'llama', 'bert'), tuple(MODELS)
MEMBERS = {
    'rescale': (scaled, ALL),
    'smooth': (lambda m, name: smooth.smooth(m, largest(name), found(name)), ALL),
    'smooth_inputs': (lambda m, name: smooth.smooth_inputs(
        m, largest(name), [p for p in largest(name) if p.endswith('/o')]), TRANSFORMERS),
    'awq': (searched, TRANSFORMERS),
    'equalize': (lambda m, name: equalize.equalize(
        m, [link for link in found(name) if 'norm' not in link.source]), ALL),
    'R1': (turned, DECODERS),
    'R2': (heads, TRANSFORMERS),
    'R3': (lambda m, name: rotate.rotate_scores(m), TRANSFORMERS),
    'R4': (lambda m, name: rotate.rotate_inputs(m), TRANSFORMERS),
    'R1 to R4': (lambda m, name: rotate.rotate_inputs(rotate.rotate_scores(heads(turned(m, name), name))), DECODERS),
}


@pytest.mark.parametrize(('member', 'name'), [(m, n) for m, (_, names) in MEMBERS.items() for n in names])
def test_outputs_stay(member, name):
  make, x, _ = MODELS[name]
  model = make()
  before = jax.tree.map(np.asarray, nnx.state(model))
  graph = nnx.graphdef(model)
  other = MEMBERS[member][0](model, name)
  assert links.distance(model, other, x) <= 1e-5
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
  assert nnx.graphdef(model) == graph
  changed = jax.tree.leaves(nnx.state(other, nnx.Param))
  assert member == 'R3' or any(a.shape != b.shape or (np.asarray(a) != b).any()
                               for a, b in zip(changed, jax.tree.leaves(nnx.state(model, nnx.Param))))
