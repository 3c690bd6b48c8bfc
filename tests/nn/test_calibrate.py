"""calibrate: the ranges that observers find by hand, for the right layers, and nothing else changed."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import observers, qarray, specs
from qat.nn import recipes
from qat.quantizers import base, lsq, static
from tests.nn import zoo

INT8 = specs.integer(8, specs.TENSOR)
UINT8 = specs.integer(8, specs.TENSOR, signed=False)


class Model(nnx.Module):

  def __init__(self, rngs):
    self.first, self.second = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


BATCHES = [jax.random.normal(jax.random.key(i), (4, 3, 8)) * (i + 1) for i in range(3)]


def by_hand(observer, spec, batches):
  state = observer.init((1, 8), spec.block)
  for x in batches:
    state = observer.update(state, x.reshape(-1, 8), spec.block)
  return observer.fit(state, spec)[0]


@pytest.mark.parametrize('quantizer', [
    static.Static(INT8), static.Static(INT8, observer=observers.MovingAverage()),
    static.Static(INT8, observer=observers.Percentile()), static.Static(specs.integer(8, (..., 1))),
    lsq.LSQ(specs.integer(4, specs.TENSOR))], ids=['min-max', 'moving average', 'percentile', 'channels', 'lsq'])
def test_ranges_are_the_observers(quantizer):
  model = qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('.*', input=quantizer),))
  calibrated = qat.calibrate(model, iter(BATCHES))
  q = vars(calibrated.first)['quantizers'].input
  got = q.s[...] if isinstance(quantizer, lsq.LSQ) else q.scale.get_value()
  np.testing.assert_allclose(got, by_hand(quantizer.observer, quantizer.spec, BATCHES).reshape(got.shape), rtol=1e-6)
  assert isinstance(q.s, base.StepSize) if isinstance(quantizer, lsq.LSQ) else isinstance(q.scale, base.Range)


def test_inputs_that_are_never_negative_get_the_unsigned_grid():
  model = qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('.*', input=static.Static(INT8, unsigned=UINT8)),))
  calibrated = qat.calibrate(model, BATCHES)
  specs_of = [vars(layer)['quantizers'].input.spec for layer in (calibrated.first, calibrated.second)]
  assert specs_of == [INT8, UINT8]


def test_nothing_else_changes():
  model = qat.quantize(Model(nnx.Rngs(0)), recipes.get('w4a8_static'))
  model.train()
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat, nnx.Param)[0]))
  calibrated = qat.calibrate(model, BATCHES)
  after = nnx.to_pure_dict(nnx.state(calibrated, nnx.BatchStat, nnx.Param)[0])
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert calibrated.dropout.deterministic is False and calibrated.norm.use_running_average is False
  with pytest.raises(ValueError, match="Layer 'first'.*no range yet"):
    model(BATCHES[0])                                                         # The model that was given stays.


def test_layers_watch_floats_under_quantized_weights():
  """The second layer's range is that of what the first one gives without a grid on its input."""
  rule = qat.Rule('.*', recipes.get('w4a8')[-1].weight, static.Static(INT8))
  calibrated = qat.calibrate(qat.quantize(Model(nnx.Rngs(0)), (rule,)), BATCHES)
  hidden = qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('.*', rule.weight),))
  hidden.eval()
  x = [nnx.relu(hidden.norm(hidden.first(b))) for b in BATCHES]
  np.testing.assert_allclose(vars(calibrated.second)['quantizers'].input.scale.get_value(),
                             by_hand(observers.MinMax(), INT8, x).reshape(()), rtol=1e-6)


@pytest.mark.parametrize('name', ['scanned', 'ensemble'])
def test_stacked_layers_have_a_range_each(name):
  x = zoo.example(name)
  model = qat.quantize(zoo.MODELS[name](nnx.Rngs(0)), (qat.Rule('.*', input=static.Static(INT8)),))
  calibrated = qat.calibrate(model, [x])
  layer = calibrated.blocks.linear if name == 'scanned' else calibrated.layers
  scales = np.asarray(vars(layer)['quantizers'].input.scale.get_value())
  assert scales.shape == (3, 1) and (scales > 0).all()
  if name == 'ensemble':
    np.testing.assert_allclose(scales, np.abs(x).max() / 127, rtol=1e-6)
  else:
    assert len(np.unique(scales)) == 3
  run = nnx.jit(lambda m: m(x))
  np.testing.assert_array_equal(run(calibrated), run(qat.freeze(calibrated)))


def test_attention_has_a_range_an_operand():
  model = qat.quantize(zoo.Attention(nnx.Rngs(0)), (qat.Rule('.*', scores=static.Static(INT8, unsigned=UINT8)),))
  scores = vars(qat.calibrate(model, [zoo.example('attention')]).attention)['quantizers'].scores
  assert scores.probabilities.spec == UINT8 and scores.query.spec == INT8
  np.testing.assert_allclose(scores.probabilities.scale.get_value(), 1 / 255, rtol=1e-6)  # The first row sees itself.


def test_an_output_is_calibrated_too():
  layer = nnx.LinearGeneral(8, (2, 3), rngs=nnx.Rngs(0))
  for block in ((...,), (..., 1)):
    model = qat.quantize(layer, (qat.Rule('.*', output=static.Static(specs.integer(8, block))),))
    q = vars(qat.calibrate(model, BATCHES[:1]))['quantizers'].output
    want = np.abs(layer(BATCHES[0])).max((0, 1, 2) if block == (..., 1) else None) / 127
    np.testing.assert_allclose(q.scale.get_value(), want, rtol=1e-6)


def test_an_embedding_that_is_only_looked_up_needs_no_range():
  model = qat.quantize(nnx.Embed(4, 8, rngs=nnx.Rngs(0)), recipes.get('w8a8_static'))
  assert vars(qat.calibrate(model, [jnp.arange(4)]))['quantizers'].input is None


def test_apply_says_what_a_batch_is():
  model = qat.quantize(Model(nnx.Rngs(0)), recipes.get('w8a8_static'))
  batches = [{'image': x} for x in BATCHES]
  a = qat.calibrate(model, batches, apply=lambda m, batch: m(batch['image']))
  b = qat.calibrate(model, BATCHES)
  jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, base.Range)) for m in (a, b)))


def test_a_layer_that_no_batch_reaches_is_named():
  model = qat.quantize(Model(nnx.Rngs(0)), recipes.get('w8a8_static'))
  with pytest.raises(ValueError, match="'second.input' was not reached by any calibration batch"):
    qat.calibrate(model, BATCHES, apply=lambda m, x: m.first(x))


def test_no_batch_is_an_error():
  with pytest.raises(ValueError, match='calibrate was given no batch'):
    qat.calibrate(qat.quantize(Model(nnx.Rngs(0)), recipes.get('w8a8_static')), [])


def test_one_array_is_no_list_of_batches():
  with pytest.raises(TypeError, match=r'calibrate was given one array of shape \(4, 4\).*Write \[x\]'):
    qat.calibrate(qat.quantize(Model(nnx.Rngs(0)), recipes.get('w8a8_static')), jnp.ones((4, 4)))


def test_a_block_of_numbers_to_come_is_refused():
  model = qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('.*', input=static.Static(specs.integer(8, specs.TOKEN))),))
  with pytest.raises(ValueError, match=r'a range that is fixed before the numbers are known'):
    qat.calibrate(model, BATCHES)


def test_a_model_without_static_quantizers_is_returned_as_it_is():
  model = qat.quantize(Model(nnx.Rngs(0)), recipes.get('w8a8'))
  assert qat.explain(qat.calibrate(model, iter(()))) == qat.explain(model)


def test_freezing_what_was_not_calibrated_names_the_layer():
  model = qat.quantize(Model(nnx.Rngs(0)), recipes.get('w8a8_lsq'))
  with pytest.raises(ValueError, match=r"Layer 'first' has a LSQ that was not calibrated.*Call qat\.calibrate"):
    qat.freeze(model)


def test_scales_are_plain_arrays_also_on_a_grid_of_their_own():
  spec = qarray.Spec(INT8.format, specs.TENSOR, specs.F16)
  calibrated = qat.calibrate(qat.quantize(Model(nnx.Rngs(0)), (qat.Rule('first', input=static.Static(spec)),)), BATCHES)
  scale = vars(calibrated.first)['quantizers'].input.scale.get_value()
  assert scale == scale.astype(jnp.float16).astype(jnp.float32)
