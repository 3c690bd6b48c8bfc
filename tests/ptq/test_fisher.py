"""The importance of a block's output against Li et al. 2021 (https://arxiv.org/abs/2102.05426), Eq. 10."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.models import mlp
from qat.ptq import fisher

Z = jax.random.normal(jax.random.key(0), (6, 4))
A = jax.random.normal(jax.random.key(1), (4, 3))
LABELS = jnp.array([0, 1, 2, 0, 1, 2])


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_of_a_linear_classifier():
  """dL/dz = (softmax(z A) - onehot) A^T."""
  g = (softmax(np.float64(Z) @ np.float64(A)) - np.eye(3)[LABELS]) @ np.float64(A).T
  got = jax.jit(lambda z: fisher.fisher(lambda z: z @ A, z, fisher.cross_entropy(LABELS)))(Z)
  np.testing.assert_allclose(got, g**2 / (g**2).mean(), rtol=1e-4)


def test_by_divergence_from_the_float_network():
  """dKL/dz = (softmax(z A) - softmax(y)) A^T, which is 0 at the float network's own scores."""
  y = (Z + 0.3) @ A
  g = (softmax(np.float64(Z) @ np.float64(A)) - softmax(np.float64(y))) @ np.float64(A).T
  got = jax.jit(lambda z: fisher.fisher(lambda z: z @ A, z, fisher.divergence(y)))(Z)
  np.testing.assert_allclose(got, g**2 / (g**2).mean(), rtol=1e-2, atol=1e-4)


def test_where_nothing_matters_all_counts_alike():
  np.testing.assert_array_equal(fisher.fisher(lambda z: 0 * z, Z, jnp.sum), np.ones(Z.shape))


def test_importances_of_all_layers_of_a_network_are_those_of_each():
  model = mlp.MLP((4, 5, 3), nnx.Rngs(0))
  batches = [Z[:3], Z[3:]]
  labels = lambda batch: LABELS[:len(batch)]
  loss = lambda model, batch: fisher.cross_entropy(labels(batch))(model(batch)) / len(batch)
  found = fisher.importances(model, batches, loss, ['layers/0', 'layers/1', 'nowhere'])
  assert set(found) == {'layers/0', 'layers/1'}
  rest = lambda z: model.layers[1](nnx.relu(z))
  for path, apply_rest, outputs in (('layers/0', rest, model.layers[0]), ('layers/1', lambda z: z, model)):
    want = [jax.grad(lambda z, b=b: loss(lambda _: apply_rest(z), b))(outputs(b)) ** 2 for b in batches]
    want = np.concatenate(want)
    np.testing.assert_allclose(fisher.scaled(found[path]), want / want.mean(), rtol=2e-2, atol=1e-6)  # In bfloat16.


def test_without_any_gradient_all_outputs_count_alike():
  np.testing.assert_array_equal(fisher.scaled([np.zeros((2, 3), np.float32)]), np.ones((2, 3)))
