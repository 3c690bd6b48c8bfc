"""A chain that is run block by block, and then some positions at a time, gives what the whole model gives."""

from flax import nnx
import jax
import numpy as np
import pytest

import qat
from qat.nn import calls
from qat.ptq import running, stages
from tests.ptq import tiny

call = lambda model, batch: model(*batch)
MASKED = (tiny.TOKENS, jax.numpy.array([[True] * 6, [True] * 4 + [False] * 2]))


@pytest.mark.parametrize('make, batch', [(tiny.llama, (tiny.TOKENS,)), (tiny.gpt, (tiny.TOKENS,)),
                                         (tiny.bert, MASKED)], ids=['llama', 'gpt', 'bert'])
@pytest.mark.parametrize('is_frozen', [False, True])
def test_streamed_is_the_whole_model(make, batch, is_frozen):
  model = make()
  if is_frozen:
    model = qat.freeze(qat.quantize(model, qat.recipes.get('w4a8')))
  blocks = stages.chain(calls.trace(model, call, batch), model)
  assert len(blocks) == 2
  streamed = running.streamed(model, call, blocks)
  whole = nnx.jit(call)(model, batch)

  def run(batch):
    rows = streamed(batch)
    assert rows.shape == whole.shape
    return np.stack([np.concatenate([rows[i, :4], rows[i, 4:]]) for i in range(2)])

  for _ in range(2):
    np.testing.assert_allclose(run(batch), whole, rtol=1e-4, atol=1e-4)
  other = tuple(a[:, ::-1] for a in batch)
  np.testing.assert_allclose(run(other), nnx.jit(call)(model, other), rtol=1e-4, atol=1e-4)
