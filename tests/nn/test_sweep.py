"""A sweep in one process: what ran before changes nothing.

JAX shares traces of `@`, jnp.dot and jnp.matmul across models of one shape, so a quantizer hidden in a
patched function would leak from one model into the next.
"""

import itertools
import subprocess
import sys

from flax import nnx
import numpy as np
import pytest

import qat
from qat.nn import recipes
from tests.nn import zoo

BITS = (2, 3, 4, 8)
SPELLINGS = [name for name in zoo.MODELS if name.startswith('bare')] + ['other methods', 'subclasses', 'remat']
PROGRAM = '''
import sys
import numpy as np
from tests.nn import test_sweep
np.savez(sys.stdout.buffer, *test_sweep.outputs(test_sweep.SPELLINGS, int(sys.argv[1])))
'''


@nnx.jit
def run(models, xs):
  return {name: model(xs[name]) for name, model in models.items()}


def outputs(names, bits):
  """The outputs of one model a spelling, at `bits`."""
  rules = recipes.dynamic(bits, bits)
  models = nnx.Dict({name: qat.quantize(zoo.MODELS[name](nnx.Rngs(0)), rules) for name in names})
  ys = run(models, {name: zoo.example(name) for name in names})
  return [np.asarray(ys[name]) for name in names]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The outputs of each bit-width in a process of its own: bits -> arrays."""
  found = {}
  for bits in BITS:
    path = tmp_path_factory.mktemp('sweep') / f'{bits}.npz'
    with path.open('wb') as file:
      subprocess.run([sys.executable, '-c', PROGRAM, str(bits)], stdout=file, check=True)
    with np.load(path) as arrays:
      found[bits] = [arrays[f'arr_{i}'] for i in range(len(SPELLINGS))]
  return found


@pytest.mark.parametrize('order', [BITS, BITS[::-1], (3, 8, 2, 4, 3)], ids=str)
def test_any_order_gives_what_separate_processes_give(order, alone):
  for bits in order:
    for name, got, want in zip(SPELLINGS, outputs(SPELLINGS, bits), alone[bits]):
      np.testing.assert_array_equal(got, want, err_msg=f'{name} at {bits} bits')
  for a, b in itertools.combinations(BITS, 2):
    assert all((x != y).any() for x, y in zip(alone[a], alone[b]))


def test_eager_models_of_one_shape_do_not_share_grids():
  """One after the other on one spelling, without jit, against numpy."""
  x = np.asarray(zoo.example('bare @'))
  for bits in (2, 8, 4, 2):
    model = zoo.MODELS['bare @'](nnx.Rngs(0))
    w = np.asarray(model.p[...])
    most = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(0, keepdims=True) / np.float32(most)
    want = x @ (np.clip(np.round(w * (1 / scale)), -most - 1, most) * scale)
    np.testing.assert_allclose(qat.quantize(model, recipes.weight_only(bits))(x), want, rtol=1e-5, atol=1e-5)
