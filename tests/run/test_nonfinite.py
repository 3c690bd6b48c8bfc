"""A number that is not finite stops the run with the name of the layer."""

import pathlib

from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qat.models import mlp
from qat.run import cli
from qat.run import nonfinite
from qat.run import objectives
from qat.run import state as states

TINY = str(pathlib.Path(__file__).with_name('tiny.py'))


class Outer(nnx.Module):
  """Layers below layers, called in another order than they are defined."""

  def __init__(self, rngs):
    self.last = nnx.Linear(4, 3, rngs=rngs)
    self.inner = mlp.MLP((4, 4, 4), rngs)

  def __call__(self, x):
    return self.last(self.inner(x))


def parts(model, **params):
  """(skeleton, state) with some parameters replaced."""
  skeleton, p, rest = states.take_apart(model)
  return skeleton, states.new({**p, **params}, rest, optax.sgd(0.1))


def culprit(model, batch=None, **params):
  batch = batch or dict(image=np.ones((2, 4), np.float32), label=np.zeros(2, np.int32))
  skeleton, state = parts(model, **params)
  return nonfinite.culprit(skeleton, objectives.classification, state, batch)


def test_the_first_layer_called_is_named():
  """Weights of 1e30 overflow in the second layer of the inner network."""
  huge = jnp.full((4, 4), 1e30)
  assert culprit(Outer(nnx.Rngs(0)), **{'inner/layers/0/kernel': huge, 'inner/layers/1/kernel': huge}) == (
      "the output of layer 'inner/layers/1'")


def test_a_parameter_a_batch_a_gradient():
  assert culprit(Outer(nnx.Rngs(0)), **{'last/bias': jnp.array([0, jnp.inf, 0])}) == "the parameter 'last/bias'"
  bad = dict(image=np.full((2, 4), np.nan, np.float32), label=np.zeros(2, np.int32))
  assert culprit(Outer(nnx.Rngs(0)), bad) == "the batch's 'image', and so the output of layer 'inner/layers/0'"


def test_an_overflow_after_the_last_layer_names_the_largest():
  """Scores of +-3e38 are finite; their difference is not."""
  kernel = jnp.array([[3e38, -3e38, 0]] + [[0, 0, 0]] * 3)
  batch = dict(image=np.ones((2, 4), np.float32), label=np.ones(2, np.int32))
  assert culprit(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), batch, **{'layers/0/kernel': kernel}) == (
      "the loss (every layer was finite; the largest output, 3e+38, is that of layer 'layers/0')")


class Root(nnx.Module):
  """The square root is finite at 0, its gradient is not."""

  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return jnp.sqrt(self.linear(x))


def test_a_gradient_is_named_when_all_outputs_are_finite():
  assert culprit(Root(nnx.Rngs(0)), **{'linear/kernel': jnp.zeros((4, 3))}) == "the gradient of 'linear/kernel'"


def test_a_run_stops_with_the_layer_and_keeps_what_is_needed(tmp_path, capfd):
  argv = ['train', f'--config={TINY}:steps=20', f'--workdir={tmp_path}', '--config.optimizer.learning_rate=1e25']
  assert cli.main(argv) == 2
  said = capfd.readouterr().err
  assert "the output of layer 'layers/1' is not finite" in said
  assert 'Lower optimizer.learning_rate' in said and 'Traceback' not in said
  saved = np.load(next(tmp_path.glob('nonfinite_*.npz')))
  assert saved['params/layers/0/kernel'].shape == (64, 16)
  assert np.isfinite(saved['params/layers/0/kernel']).all()
  assert saved['batch/image'].shape == (16, 8, 8, 1)


@pytest.mark.parametrize('quantizer', ['lsq', 'ste'])
def test_a_quantized_layer_is_named(tmp_path, capfd, quantizer):
  argv = ['train', f'--config={TINY}:quantizer={quantizer},steps=20', f'--workdir={tmp_path}',
          '--config.optimizer.learning_rate=1e30']
  assert cli.main(argv) == 2
  said = capfd.readouterr().err
  assert "'layers/" in said and 'is not finite' in said and 'Traceback' not in said
