import weakref

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.models.pretrained import fill
from qat.models.pretrained import names


class Normed(nnx.Module):
  """Variables of two kinds, and one layer in two places."""

  def __init__(self):
    self.linear = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    self.again = self.linear
    self.norm = nnx.BatchNorm(3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


TABLE = [names.Name('mean', 'norm/mean'),
         names.Name('var', 'norm/var'), names.Name('w', 'linear/kernel', names.transposed),
         names.Name('w', 'again/kernel', names.transposed)]
TENSORS = dict(w=np.arange(6.0).reshape(3, 2), mean=np.ones(3, np.float16), var=np.full(3, 2.0, np.float32))


def test_every_variable_gets_its_tensor_once():
  model = fill.fill(Normed, TENSORS, TABLE, 'file')
  np.testing.assert_array_equal(model.linear.kernel[...], TENSORS['w'].T)
  np.testing.assert_array_equal(model.norm.mean[...], TENSORS['mean'])
  assert isinstance(model.norm.var, nnx.BatchStat) and model.again is model.linear
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}


def test_tensors_are_read_one_at_a_time():
  """When the next is asked for, nothing holds the one before."""
  alive = []

  class Tensors(dict):

    def __getitem__(self, name):
      alive.append(sum(ref() is not None for ref in refs))
      x = super().__getitem__(name).copy()
      refs.append(weakref.ref(x))
      return x

  refs = []
  fill.fill(Normed, Tensors(TENSORS), TABLE, 'file')
  assert alive == [0, 0, 0]


def test_tensors_that_may_be_left_over():
  more = TENSORS | dict(steps=np.ones(1), position=np.ones(1))
  fill.fill(Normed, more, TABLE, 'file', ['steps', 'posi.*'])
  with pytest.raises(ValueError, match=r"file: 1 tensors have no place in the model, the first \['position'\]"):
    fill.fill(Normed, more, TABLE, 'file', ['steps', 'posi'])


@pytest.mark.parametrize('wrong, message', [
    (dict(w=np.ones((2, 3))), r"file: tensor 'w' has shape \(2, 3\), which becomes \(3, 2\): again/kernel has shape"),
    (dict(w=np.ones((3, 2), np.int64)), "file: tensor 'w' has dtype int64"),
    (dict(w=np.ones((3, 2), jnp.float8_e4m3fn)), "file: tensor 'w' has dtype float8_e4m3fn"),
])
def test_tensors_that_do_not_fit(wrong, message):
  with pytest.raises(ValueError, match=message):
    fill.fill(Normed, TENSORS | wrong, TABLE, 'file')


def test_a_missing_tensor_and_what_is_near():
  tensors = {'vars': TENSORS['var'], 'w': TENSORS['w'], 'mean': TENSORS['mean']}
  with pytest.raises(ValueError, match=r"1 of 3 variables have no tensor, the first 'norm/var', which should be 'var'. "
                                       r"The file has 3 tensors, near it \['vars'\]"):
    fill.fill(Normed, tensors, TABLE, 'file')


def test_a_variable_without_a_row():
  with pytest.raises(ValueError, match="Variable 'norm/var': no row of the table"):
    fill.fill(Normed, TENSORS, [row for row in TABLE if row.theirs != 'var'], 'file')
