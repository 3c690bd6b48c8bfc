"""What runs again in the backward pass is what ran forward, by the same random numbers."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.run import remat


class Dropped(nnx.Module):

  def __init__(self, rngs):
    self.block = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 8, rngs=rngs))

  def __call__(self, x):
    return self.block(self.block(x))


def test_dropout_runs_again_by_the_same_numbers():
  plain = Dropped(nnx.Rngs(0))
  again = remat.remat(plain, 'block')
  x = jax.random.normal(jax.random.key(1), (4, 8))

  @nnx.jit
  def gradient(model):
    return nnx.value_and_grad(lambda model: jnp.sum(model(x) ** 2))(model)

  for _ in range(2):  # The second call goes on with the random numbers where the first ended.
    (a, da), (b, db) = gradient(plain), gradient(again)
    assert float(a) == float(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-6), *map(jax.tree.leaves, (da, db)))
