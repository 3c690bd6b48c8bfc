"""Rules over paths: which axis of the mesh splits which axis of which array."""

from flax import nnx
import pytest

import qat
from qat.models import cnn, decoder
from qat.nn import lora, recipes, transform
from qat.quantizers.lsq import LSQ
from qat.quantizers.ste import STE
from qat.run import sharding
from qat.run import state as states

SIZES = dict(data=1, fsdp=4, sequence=1, model=2)


def table(*rules, leaf='sharding'):
  return sharding.table({leaf: rules}, leaf, SIZES, sharding.DEFAULT)


def llama(width=32, **settings):
  return nnx.eval_shape(lambda: decoder.llama(
      nnx.Rngs(0), vocab_size=64, context_length=16, width=width, layers=1, heads=4, **settings))


def test_defaults_are_megatrons_columns_and_rows():
  split = sharding.placed(llama(tied_head=False), table(), SIZES)
  assert split['blocks/0/ffn/up/kernel'] == (('fsdp',), ('model',))
  assert split['blocks/0/ffn/down/kernel'] == (('model',), ('fsdp',))
  assert split['blocks/0/attention/q/kernel'] == (('fsdp',), ('model',))
  assert split['blocks/0/attention/o/kernel'] == (('model',), ('fsdp',))
  assert split['head/kernel'] == (('fsdp',), ('model',))
  assert split['embed/embedding'] == (('model',), ('fsdp',))
  assert 'norm/scale' not in split


def test_defaults_leave_whole_what_they_do_not_divide():
  split = sharding.placed(nnx.eval_shape(lambda: cnn.CNN(channels=(6, 16), rngs=nnx.Rngs(0))), table(), SIZES)
  convs = {path: axes for path, axes in split.items() if path.endswith('conv/kernel')}
  assert convs['blocks/0/conv/kernel'] == ((), (), (), ('model',))       # 1 input, 6 outputs.
  assert convs['blocks/1/conv/kernel'] == ((), (), (), ('model',))       # 6 inputs: not a multiple of 4.


@pytest.mark.parametrize('block, scale', [((None, 1), ((), ('model',))), ((8, 1), (('fsdp',), ('model',))),
                                          ((16, 1), ((), ('model',)))])
def test_codes_and_scales_follow_their_weight(block, scale):
  spec = qat.Spec(qat.formats.INT4, block)
  model = decoder.llama(nnx.Rngs(0), vocab_size=64, context_length=16, width=32, layers=1, heads=4)
  quantized = transform.quantize(model, [qat.Rule('blocks/0/ffn/up', weight=LSQ(spec))])
  split = sharding.placed(quantized, table(), SIZES)
  learned = next(path for path in split if path.startswith('blocks/0/ffn/up/quantizers/weights/kernel/'))
  assert split[learned] == scale
  frozen = transform.freeze(quantized)
  split = sharding.placed(frozen, table(), SIZES)
  assert split['blocks/0/ffn/up/kernel/codes'] == (('fsdp',), ('model',))
  assert split['blocks/0/ffn/up/kernel/scale'] == scale
  names = {**states.take_apart(frozen)[1], **states.take_apart(frozen)[2]}
  assert set(split) <= set(names)                                        # The paths of a run's arrays.


def test_scales_on_a_grid_of_their_own_follow_too():
  model = decoder.llama(nnx.Rngs(0), vocab_size=64, context_length=16, width=32, layers=1, heads=4)
  frozen = transform.freeze(transform.quantize(model, recipes.resolve(dict(name='float', rules={'embed': 'nf4_dq'}))))
  split = sharding.placed(frozen, table(), SIZES)
  assert split['embed/embedding/codes'] == (('fsdp',), ('model',))       # Features x words, as matrices are.
  assert any(path.startswith('embed/embedding/scale/') for path in split)


def test_stacked_layers_are_split_by_their_last_axes():
  stack = nnx.vmap(lambda rngs: nnx.Linear(8, 4, rngs=rngs), in_axes=0)(nnx.Rngs(0).split(3))
  model = nnx.Sequential(stack)
  assert sharding.placed(model, table(), SIZES)['layers/0/kernel'] == ((), ('fsdp',), ('model',))


def test_adapters_follow_their_weight():
  model = decoder.llama(nnx.Rngs(0), vocab_size=64, context_length=16, width=32, layers=1, heads=4)
  adapted = lora.lora(model, ['blocks/0/ffn/.*'], 4, 8.0, rngs=nnx.Rngs(0), dora=True)
  split = sharding.placed(adapted, table(), SIZES)
  of = {path.rpartition('/')[2]: axes for path, axes in split.items() if path.startswith('blocks/0/ffn/up/adapters/')}
  assert of == dict(A=(('fsdp',), ()), B=((), ('model',)), magnitude=(('model',),))


def test_the_first_match_wins_and_none_is_whole():
  rules = table((r'blocks/0/ffn/up/kernel', (None, 'fsdp')), (r'blocks/0/ffn/.*kernel', (('fsdp', 'model'), None)))
  split = sharding.placed(llama(), rules, SIZES)
  assert split['blocks/0/ffn/up/kernel'] == ((), ('fsdp',))
  assert split['blocks/0/ffn/down/kernel'] == (('fsdp', 'model'), ())
  assert 'embed/embedding' not in split


@pytest.mark.parametrize('rule, words', [
    (('head/kernel', ('fdsp',)), ["no axis 'fdsp'", "Did you mean 'fsdp'"]),
    (('(', ('fsdp',)), ["'('", 'no regular expression']),
    (('.*', 'fsdp'), ['no tuple', "('fsdp',)"]),
    (('.*', ('fsdp', 'fsdp')), ["'fsdp' twice"]),
    (('.*', (('fsdp', 'model'), 'model')), ["'model' twice"]),
    (('blocks/9/.*', ('fsdp',)), ["['blocks/9/.*']", 'No parameter is left', 'blocks/0/ffn/up/kernel']),
    (('embed/embedding', (None, None, 'fsdp')), ['3 entries', '(64, 36)']),
    (('embed/embedding', (None, ('fsdp', 'model'))), ["axis 1 of 'embed/embedding' has 36 elements",
                                                      'mesh.fsdp=4 * mesh.model=2', 'whole (None)']),
    ('head/kernel', ['a tuple of pairs']),
])
def test_a_wrong_rule_says_what_is_there(rule, words):
  with pytest.raises(ValueError) as error:
    sharding.placed(llama(width=36), table(rule), SIZES)
  assert all(word in str(error.value) for word in words), error.value


def test_a_rule_behind_one_that_has_all_of_its_paths_is_refused():
  with pytest.raises(ValueError, match=r"rules \['head/kernel'\]"):
    sharding.placed(llama(tied_head=False), table(('.*kernel', ()), ('head/kernel', ('model',))), SIZES)


def test_quantizers_of_inputs_stay_whole():
  spec = qat.Spec(qat.formats.INT8, (None,))
  model = transform.quantize(llama(), [qat.Rule('blocks/0/ffn/up', input=STE(spec))])
  assert not [path for path in sharding.placed(model, table(), SIZES) if 'quantizers/input' in path]
