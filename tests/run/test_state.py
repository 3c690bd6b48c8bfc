"""The train step: parts of a batch add up, randomness is state, what is not finite changes nothing."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qat.models import mlp
from qat.run import objectives
from qat.run import state as states


class Noisy(nnx.Module):
  """Has every kind of state: parameters, statistics, random keys."""

  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(self.norm(self.first(x))))


def batch_of(size, seed=0):
  rng = np.random.default_rng(seed)
  return dict(image=rng.normal(size=(size, 4)).astype(np.float32), label=rng.integers(3, size=size).astype(np.int32))


SGD = optax.sgd(0.1)


def run(model, batches, accumulate_steps=1, tx=SGD):
  """(state, metrics of the last step)."""
  skeleton, params, rest = states.take_apart(model)
  state = states.new(params, rest, tx)
  step = states.train_step(skeleton, objectives.classification, tx, accumulate_steps)
  for batch in batches:
    state, metrics = step(state, batch)
  return state, metrics


def test_a_model_comes_together_again():
  model = Noisy(nnx.Rngs(0))
  skeleton, params, rest = states.take_apart(model)
  assert list(params) == ['first/bias', 'first/kernel', 'last/bias', 'last/kernel', 'norm/bias', 'norm/scale']
  assert list(rest) == ['dropout/rngs/count', 'dropout/rngs/key', 'norm/mean', 'norm/var']
  again = skeleton.join(params, rest)
  x = batch_of(5)['image']
  model.eval(), again.eval()
  np.testing.assert_array_equal(model(x), again(x))


def test_parts_of_a_batch_add_up_to_the_batch():
  model = mlp.MLP((4, 8, 3), nnx.Rngs(0))
  whole, a = run(model, [batch_of(12)] * 3)
  parts, b = run(model, [batch_of(12)] * 3, accumulate_steps=4)
  for path in whole.params:
    np.testing.assert_allclose(whole.params[path], parts.params[path], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)


def test_parts_must_divide_the_batch():
  with pytest.raises(ValueError, match='accumulate_steps 5 does not divide the batch of 12'):
    run(mlp.MLP((4, 3), nnx.Rngs(0)), [batch_of(12)], accumulate_steps=5)


def test_statistics_and_random_counts_move():
  state, _ = run(Noisy(nnx.Rngs(0)), [batch_of(8)] * 3)
  assert int(state.step) == 3
  assert int(state.rest['dropout/rngs/count']) == 3
  assert np.abs(state.rest['norm/mean']).max() > 0


def test_what_is_not_finite_changes_nothing():
  bad = batch_of(8)
  bad['image'][3, 2] = np.nan
  tx = optax.adam(0.1)
  before, _ = run(Noisy(nnx.Rngs(0)), [batch_of(8)], tx=tx)
  after, metrics = run(Noisy(nnx.Rngs(0)), [batch_of(8), bad, batch_of(8)], tx=tx)
  assert not metrics['finite']
  assert bool(before.finite) and not bool(after.finite)
  for name, x in jax.tree_util.tree_leaves_with_path(before):
    if 'finite' not in jax.tree_util.keystr(name):
      y = dict(jax.tree_util.tree_leaves_with_path(after))[name]
      assert (x == y).all(), name


def test_next_token_loss_in_bits():
  """Uniform scores over 8 symbols cost 3 bits each."""
  batch = dict(tokens=jnp.zeros((2, 5), jnp.int32))
  values = objectives.language.values(jnp.zeros((2, 4, 8)), batch)
  np.testing.assert_allclose(values['bits_per_character'], 3.0, rtol=1e-6)
  assert objectives.language.inputs(batch).shape == (2, 4)
