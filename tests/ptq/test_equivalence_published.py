"""Equivalences leave the outputs of published networks within 1e-5 of the largest."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from qat.core import hadamard
from qat.nn import batch_norm
from qat.ptq import equalize, links, rotate, smooth
from qat.run import published

pytestmark = pytest.mark.slow
TEXT = 'The capital of France is Paris, and the union of these states shall be perpetual. '
WITHIN = 1e-5


@functools.cache
def language(name):
  loaded = published.load(name)
  return loaded.model, jnp.array([loaded.tokenizer.encode(TEXT * 3).ids[:48]])


def test_smoothquant_of_smollm2():
  model, tokens = language('smollm2')
  found = links.find(model, tokens)
  assert len(found) == 60
  seen = smooth.largest(model, [path for link in found for path in link.targets], [tokens])
  assert links.distance(model, smooth.smooth(model, seen, found), tokens) <= WITHIN


def test_rotations_of_smollm2():
  model, tokens = language('smollm2')
  stream = rotate.resolve(model, rotate.TIED_DECODER, tokens)
  values = links.resolve(model, links.heads(64), tokens)
  other, stream = rotate.fold_norms(model, stream)
  assert links.distance(model, other, tokens) <= WITHIN
  other = rotate.rotate_stream(other, stream, hadamard.randomized(jax.random.key(0), 576))
  other = rotate.rotate_heads(other, values, hadamard.randomized(jax.random.key(1), 64))
  assert links.distance(model, other, tokens) <= WITHIN
  other = rotate.rotate_inputs(rotate.rotate_scores(other))
  assert links.distance(model, other, tokens) <= WITHIN


def test_minilm():
  """Post-norm: its layers divide or turn their inputs themselves."""
  model, tokens = language('minilm')
  assert links.find(model, tokens) == ()
  layers = [f'blocks/{i}/{name}' for i in range(model.config.layers)
            for name in ('attention/q', 'attention/k', 'attention/v', 'attention/o', 'ffn/up', 'ffn/down')]
  smoothed = smooth.smooth_inputs(model, smooth.largest(model, layers, [tokens]), layers)
  assert links.distance(model, smoothed, tokens) <= WITHIN
  values = links.resolve(model, links.heads(model.config.width // model.config.heads), tokens)
  turned = rotate.rotate_heads(model, values, hadamard.randomized(jax.random.key(0), 32))
  turned = rotate.rotate_inputs(rotate.rotate_scores(turned), r'.*(ffn/(up|down)|attention/[qkvo])')
  assert links.distance(model, turned, tokens) <= WITHIN


def test_efficientnet():
  """Its relu6 hands no factor on: what can be equalized are the narrow layers that no residual leaves out."""
  model = published.load('efficientnet_lite0').model
  images = nnx.Rngs(0).normal((1, 224, 224, 3))
  folded = batch_norm.fold_batch_norm(model, images)
  found = links.resolve(folded, [links.Link('blocks/0/project/conv', ('blocks/1/expand/conv',)),
                                 links.Link('blocks/15/project/conv', ('top/conv',))], images)
  assert links.distance(folded, equalize.equalize(folded, found), images) <= WITHIN
  with pytest.raises(ValueError, match=r'blocks/1/expand/conv.*moves the outputs|moves the outputs'):
    links.resolve(folded, links.Link('blocks/1/expand/conv', ('blocks/1/depthwise/conv',)), images)
