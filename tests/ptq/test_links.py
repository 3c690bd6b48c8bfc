"""Links: found where they hold, refused where they do not, and rescaled without a change of the outputs."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.nn import recipes
from qat.ptq import channels, links
from tests.ptq import tiny

BLOCKS = (0, 1)


def test_norms_of_a_decoder():
  found = links.find(tiny.gpt(), tiny.TOKENS)
  assert found == tuple(link for i in BLOCKS for link in (
      links.Link(f'blocks/{i}/attention_norm', tuple(f'blocks/{i}/attention/{n}' for n in 'qkv')),
      links.Link(f'blocks/{i}/ffn_norm', (f'blocks/{i}/ffn/up',))))


def test_an_untied_head_reads_the_last_norm():
  found = links.find(tiny.llama(tied_head=False), tiny.TOKENS)
  assert found[-1] == links.Link('norm', ('head',)) and len(found) == 5


def test_norms_whose_outputs_are_added_are_no_links():
  assert links.find(tiny.bert(), tiny.TOKENS) == ()


def test_patterns():
  found = links.resolve(tiny.llama(), [links.GATED, links.heads(8)], tiny.TOKENS)
  assert found == (
      *(links.Link(f'blocks/{i}/ffn/up', (f'blocks/{i}/ffn/down',)) for i in BLOCKS),
      *(links.Link(f'blocks/{i}/attention/v', (f'blocks/{i}/attention/o',), 8) for i in BLOCKS))


def test_a_gelu_hands_no_factor_on():
  with pytest.raises(ValueError, match=r"blocks/0/ffn/up.*by 0\.\d+ of the largest.*gelu"):
    links.resolve(tiny.gpt(), links.GATED, tiny.TOKENS)


def test_heads_that_are_linked_in_the_wrong_order():
  wrong = links.Link(r'(.*)/v', (r'\1/o',))                               # Not by head: run is missing.
  with pytest.raises(ValueError, match='attention/v'):
    links.resolve(tiny.llama(), wrong, tiny.TOKENS)


@pytest.mark.parametrize(('link', 'message'), [
    (links.Link('blocks/7/ffn/up', ('x',)), r'no path matches its source'),
    (links.Link('(.*)/ffn/up', (r'\1/ffn/dwn',)), r"should feed \['blocks/0/ffn/dwn'\]"),
    (links.Link('blocks/0/ffn/up', ('blocks/0/attention/o',)), r'makes 48 channels.*reads 32'),
    (links.Link('blocks/0/attention/v', ('blocks/0/attention/o',), 5), r'in runs of 5'),
    (links.Link('blocks', ('blocks/0/attention/o',)), r"'blocks' is a List"),
])
def test_errors_name_what_is_wrong(link, message):
  with pytest.raises(ValueError, match=message):
    links.resolve(tiny.llama(), link, tiny.TOKENS)
  with pytest.raises(TypeError, match='no tuple'):
    links.Link('a', 'b')


def test_scales_of_a_wrong_shape():
  link, = links.resolve(tiny.llama(), links.Link('blocks/0/ffn/up', ('blocks/0/ffn/down',)), tiny.TOKENS)
  with pytest.raises(ValueError, match=r'has \(48,\) channels.*shape \(3,\)'):
    links.rescale(tiny.llama(), {link: jnp.ones(3)})


def test_quantized_models_are_refused():
  model = qat.quantize(tiny.gpt(), recipes.get('w8a8'))
  with pytest.raises(ValueError, match='links.find the float model first'):
    links.find(model, tiny.TOKENS)


def test_the_model_given_stays_as_it_is():
  model = tiny.llama()
  before = jax.tree.map(np.asarray, nnx.state(model))
  link = links.find(model, tiny.TOKENS)[0]
  other = links.rescale(model, {link: jnp.full(24, 3.0)})
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
  np.testing.assert_allclose(other.blocks[0].attention.q.kernel[...], 3 * model.blocks[0].attention.q.kernel[...],
                             rtol=1e-6)
  np.testing.assert_allclose(other.blocks[0].attention_norm.scale[...], model.blocks[0].attention_norm.scale[...] / 3,
                             rtol=1e-6)


class Zoo(nnx.Module):
  """Einsum, LinearGeneral over two axes, grouped and transposed convolutions, a stack of layers, and each its norm."""

  def __init__(self, rngs):
    self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(5)])
    self.experts = nnx.Einsum('bd,edh->beh', (3, 8, 4), (3, 4), rngs=rngs)
    self.pairs = nnx.LinearGeneral((2, 8), (2, 3), axis=(-2, -1), rngs=rngs)
    self.grouped = nnx.Conv(8, 6, (3, 3), feature_group_count=2, rngs=rngs)
    self.up = nnx.ConvTranspose(6, 4, (2, 2), rngs=rngs)
    self.down = nnx.ConvTranspose(4, 4, (2, 2), transpose_kernel=True, rngs=rngs)
    self.alone = nnx.Linear(8, 8, rngs=rngs)

    @nnx.vmap(in_axes=0, out_axes=0)
    def block(rngs):
      return nnx.List([nnx.RMSNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
    self.stack = block(rngs.split(3))

  def __call__(self, x):
    images = nnx.relu(self.grouped(self.norms[2](x.reshape(-1, 2, 2, 8))))
    images = self.down(nnx.relu(self.up(images)))
    h, _ = nnx.scan(lambda h, block: (block[1](block[0](h)), None), in_axes=(nnx.Carry, 0))(x, self.stack)
    read_twice = self.norms[3](x)
    return (self.experts(self.norms[0](x)), self.pairs(self.norms[1](x.reshape(-1, 2, 8))), images, h,
            self.alone(read_twice) + read_twice)


X = jax.random.normal(jax.random.key(0), (4, 8))


def test_every_kind_of_layer():
  model = tiny.perturbed(Zoo(nnx.Rngs(0)))
  found = links.find(model, X)
  assert found == (links.Link('norms/2', ('grouped',)), links.Link('stack/0', ('stack/1',)),
                   links.Link('norms/0', ('experts',)), links.Link('norms/1', ('pairs',)))
  found += links.resolve(model, [links.Link('grouped', ('up',)), links.Link('up', ('down',))], X)
  assert links.size(model, found[1]) == (3, 8)
  draw = lambda i, link: jnp.exp(jax.random.normal(jax.random.key(i), links.size(model, link)))
  scales = {link: draw(i, link) for i, link in enumerate(found)}
  assert links.distance(model, links.rescale(model, scales), X) < 1e-6
  changed = links.rescale(model, scales)
  for path in ('experts', 'pairs', 'grouped', 'up', 'down', 'stack/1'):
    assert (channels.find(model, path).kernel[...] != channels.find(changed, path).kernel[...]).any()


def test_shifts():
  model = tiny.perturbed(Zoo(nnx.Rngs(0)))
  found = links.find(model, X)
  norms = [link for link in found if link.source == 'norms/1']
  shifts = {link: jax.random.normal(jax.random.key(0), links.size(model, link)) for link in norms}
  scales = {link: jnp.full(links.size(model, link), 3.0) for link in norms}
  other = links.rescale(model, scales, shifts)
  assert links.distance(model, other, X) < 2e-6
  assert (other.pairs.bias[...] != model.pairs.bias[...]).any()
  with pytest.raises(ValueError, match="'stack/0', a RMSNorm, has no bias"):
    links.rescale(model, {}, {found[1]: jnp.ones((3, 8))})


def test_a_layer_without_a_bias_gets_one():
  model = tiny.llama()
  found = links.resolve(model, links.heads(8), tiny.TOKENS)
  shifts = {link: jax.random.normal(jax.random.key(0), (16,)) for link in found}  # The weights of values sum to 1.
  other = links.rescale(model, {}, shifts)
  assert other.blocks[0].attention.v.bias is not None and model.blocks[0].attention.v.bias is None
  assert links.distance(model, other, tiny.TOKENS) < 1e-5


def test_spread_and_gather():
  s = jnp.arange(4.0)
  np.testing.assert_array_equal(links.spread(s, 8, 2), [0, 1, 0, 1, 2, 3, 2, 3])
  np.testing.assert_array_equal(links.spread(s, 8), [0, 1, 2, 3, 0, 1, 2, 3])
  np.testing.assert_array_equal(links.gather(jnp.arange(8.0), 4, 2), [2, 3, 6, 7])


def test_outputs_that_are_not_finite_are_no_equality():
  model = tiny.llama()
  broken = nnx.clone(model)
  broken.norm.scale[...] = jnp.full(24, jnp.nan)
  assert np.isnan(links.distance(model, broken, tiny.TOKENS))
