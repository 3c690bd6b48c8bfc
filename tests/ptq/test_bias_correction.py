"""Bias correction: the mean error of each layer's outputs vanishes."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import qat
from qat.core import specs
from qat.ptq import bias_correction
from qat.quantizers.ste import STE
from tests.ptq import tiny

run = nnx.jit(lambda m, x: m(x))


def test_correction_is_the_mean_error():
  draw = np.random.default_rng(0)
  x, w = draw.normal(1, 1, (500, 6)), draw.normal(size=(6, 4))
  w_hat = np.round(w * 2) / 2
  got = bias_correction.correction(*(jnp.asarray(a, jnp.float32) for a in (w, w_hat, x.mean(0))))
  np.testing.assert_allclose(got, (x @ w - x @ w_hat).mean(0), atol=1e-5)


@pytest.mark.parametrize(('beta', 'gamma'), [(0.0, 1.0), (-1.5, 0.7), (2.0, 0.3), (0.4, -2.0)])
def test_relu_mean_is_the_integral(beta, gamma):
  density = scipy.stats.norm(beta, abs(gamma)).pdf
  expected, _ = scipy.integrate.quad(lambda x: x * density(x), 0, 20)
  got = bias_correction.relu_mean(jnp.float32([beta]), jnp.float32([gamma]))
  np.testing.assert_allclose(got, [expected], rtol=1e-5)
  np.testing.assert_allclose(bias_correction.relu_mean(jnp.float32([3, -3]), jnp.zeros(2)), [3, 0])


def test_the_mean_error_of_a_network_vanishes():
  floats = tiny.convs()
  x = jax.random.normal(jax.random.key(5), (16, 8, 8, 1)) + 0.5
  model = qat.quantize(floats, [qat.Rule('.*', STE(specs.integer(3, specs.TENSOR)))])
  batches = [x[:8], x[8:]]
  other = bias_correction.correct(model, floats, batches)
  error = lambda m: np.abs((run(m, x) - run(floats, x)).mean(0)).max()
  assert error(other) < 1e-4 and error(model) > 0.01
  assert jnp.mean((run(other, x) - run(floats, x)) ** 2) < jnp.mean((run(model, x) - run(floats, x)) ** 2)
  np.testing.assert_array_equal(run(other, x), run(qat.freeze(other), x))
  frozen = bias_correction.correct(qat.freeze(model), floats, batches)
  np.testing.assert_allclose(run(frozen, x), run(other, x), atol=1e-5)


def test_a_layer_without_a_bias_gets_one():
  floats = tiny.llama()
  model = qat.quantize(floats, [qat.Rule('blocks/0/ffn/.*', STE(specs.integer(3, specs.CHANNEL))), qat.Rule('.*')])
  other = bias_correction.correct(model, floats, [tiny.TOKENS])
  assert other.blocks[0].ffn.down.bias[...].any() and model.blocks[0].ffn.down.bias is None
  assert floats.blocks[0].ffn.down.bias is None and other.blocks[1].ffn.down.bias is None
  state = nnx.to_flat_state(nnx.state(other))
  assert not [v for _, v in state if isinstance(v, bias_correction.Sum)]   # Nothing of the watching stays.


def test_what_cannot_be_corrected():
  floats = tiny.llama()
  with pytest.raises(ValueError, match='no batch'):
    bias_correction.correct(floats, floats, [])
  with pytest.raises(ValueError, match='without a quantized Linear'):
    bias_correction.correct(floats, floats, [tiny.TOKENS])
