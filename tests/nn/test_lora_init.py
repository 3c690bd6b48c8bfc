"""LoftQ and PiSSA: residuals against numpy's SVD, on matrices with the spectrum of trained ones."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.core import codebooks, qarray, ranges, specs
from qat.core.blocks import Flat
from qat.nn import adapters, lora, lora_init, merge, weights
from qat.quantizers.ste import STE

NF2 = qarray.Spec(codebooks.NF2, Flat(64, columns=True))
NF4_DQ = specs.kernel(specs.NF4_DQ)


@functools.cache
def trained(inputs=256, outputs=192):
  """A matrix with a power-law spectrum above noise, as those of trained transformers have."""
  rng = np.random.default_rng(0)
  U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (inputs, outputs))
  S = 4 * np.arange(1, outputs + 1) ** -0.7
  w = (U[:, :outputs] * S) @ V.T + 0.02 * rng.standard_normal((inputs, outputs))
  return jnp.asarray(w, jnp.float32)


def residual(w, Q, A, B):
  """|W - Q - A B|."""
  return float(np.linalg.norm(np.asarray(w - qarray.decode(Q) - A @ B, np.float64)))


@pytest.mark.parametrize('inputs, outputs', [(256, 192), (192, 256)])
def test_the_principal_part_is_that_of_a_svd_in_float64(inputs, outputs):
  w = trained() if inputs == 256 else trained().T
  A, B = map(np.float64, jax.jit(lora_init.principal, static_argnums=1)(w, 16))
  U, S, V = np.linalg.svd(np.float64(w), full_matrices=False)
  np.testing.assert_allclose(np.linalg.norm(w - A @ B), np.linalg.norm(S[16:]), rtol=1e-6)
  np.testing.assert_allclose(A @ B, (U[:, :16] * S[:16]) @ V[:16], atol=1e-4 * S[0])
  np.testing.assert_allclose(np.linalg.norm(A, axis=0), np.sqrt(S[:16]), rtol=1e-4)  # Each has half.
  np.testing.assert_allclose(np.linalg.norm(B, axis=1), np.sqrt(S[:16]), rtol=1e-4)


@pytest.mark.parametrize('spectrum', [np.geomspace(1, 1e-6, 48), np.r_[np.ones(4), np.zeros(44)], np.zeros(48)])
def test_what_the_square_loses_of_small_singular_values_is_the_root_of_epsilon(spectrum):
  rng = np.random.default_rng(0)
  U, V = (np.linalg.qr(rng.standard_normal((n, 48)))[0] for n in (48, 64))
  w = np.float32((U * spectrum) @ V.T)
  for rank in (4, 24):
    A, B = map(np.float64, jax.jit(lora_init.principal, static_argnums=1)(w, rank))
    assert np.isfinite(A).all() and np.isfinite(B).all()
    assert np.linalg.norm(w - A @ B) <= np.linalg.norm(spectrum[rank:]) + np.finfo(np.float32).eps ** 0.5 * spectrum[0]


def test_loftq_lowers_the_residual_of_nf2_by_a_fifth():
  w = trained()
  plain = lora_init.Grid(NF2)(w)
  zero = jnp.zeros((256, 16)), jnp.zeros((16, 192))
  start = residual(w, plain, *zero)
  one, five = (residual(w, *lora_init.loftq(w, NF2, 16, steps)) for steps in (1, 5))
  assert five <= one < start and five <= 0.8 * start, (start, one, five)


def test_the_first_step_of_loftq_is_the_svd_of_what_rounding_took_away():
  w = trained()
  Q, A, B = lora_init.loftq(w, NF2, 8, 1)
  want = lora_init.Grid(NF2)(w)
  np.testing.assert_array_equal(Q.codes, want.codes)
  rest = np.asarray(w - qarray.decode(want), np.float64)
  U, S, V = np.linalg.svd(rest)
  np.testing.assert_allclose(A @ B, (U[:, :8] * S[:8]) @ V[:8], atol=1e-4)
  np.testing.assert_allclose(np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=1), rtol=1e-4)  # sqrt(S) each


def by_hand(w, spec, rank, steps):
  """LoftQ's errors, step by step."""
  A, B, errors = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1])), []
  for _ in range(steps):
    Q = lora_init.Grid(spec)(w - A @ B)
    A, B = lora_init.principal(w - qarray.decode(Q), rank)
    errors.append(residual(w, Q, A, B))
  return errors


def test_loftq_stops_when_the_error_rises_and_returns_the_best():
  """A coarse grid with one scale an output, on which the error of the alternation does not fall for ever."""
  w, spec = trained(), specs.integer(2, specs.CHANNEL)
  errors = by_hand(w, spec, 4, 12)
  rises = [i for i in range(1, 12) if errors[i] >= errors[i - 1]]
  assert rises, errors                                                     # Or this test would show nothing.
  got = residual(w, *lora_init.loftq(w, spec, 4, 12))
  np.testing.assert_allclose(got, errors[rises[0] - 1], rtol=1e-4)


def test_pissa_is_exact_for_floats_and_principal():
  w = trained()
  rest, A, B = jax.jit(lora_init.pissa, static_argnums=1)(w, 16)
  np.testing.assert_allclose(rest + A @ B, w, atol=1e-5)
  S = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
  np.testing.assert_allclose(np.linalg.svd(np.asarray(rest, np.float64), compute_uv=False)[:20], S[16:36], rtol=1e-3)


def test_qpissa_quantizes_less():
  """Meng et al., Sec. 4: the rest is smaller and nearer to Gaussian than W, and so is its rounding error."""
  w = trained()
  Q, A, B = lora_init.qpissa(w, NF4_DQ, 16, ranges.centered)
  plain = lora_init.Grid(NF4_DQ, ranges.centered)(w)
  assert residual(w, Q, A, B) < 0.9 * residual(w, plain, jnp.zeros((256, 1)), jnp.zeros((1, 192)))


def test_gaussian_and_kaiming_are_pefts():
  key = jax.random.key(0)
  A = lora_init.gaussian(key, (4000, 8))
  np.testing.assert_allclose(np.std(A), 1 / 8, rtol=0.05)
  A = lora_init.KAIMING(key, (400, 64), jnp.float32)
  np.testing.assert_allclose([jnp.abs(A).max(), np.std(A)], [1 / 20, 1 / 20 / np.sqrt(3)], rtol=0.03)


class Two(nnx.Module):

  def __init__(self, rngs):
    self.first = nnx.Linear(64, 48, rngs=rngs)
    self.first.kernel[...] = 4 * trained(64, 48)
    self.stack = nnx.vmap(lambda key: nnx.Linear(48, 48, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))

  def __call__(self, x):
    return nnx.scan(lambda layer, x: jnp.tanh(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
        self.stack, self.first(x))


@functools.cache
def started():
  """A float model, the same frozen at 2 bits, and the same with adapters of each start."""
  floats = Two(nnx.Rngs(0))
  quantized = qat.quantize(floats, [qat.Rule('.*', weight=STE(specs.integer(2, (16, 1))))])
  make = lambda base, init: lora.lora(base, ['.*'], 8, 32.0, init=init)
  return floats, qat.freeze(quantized), {
      'LoftQ': make(quantized, lora_init.LoftQ(3)), 'QPiSSA': make(quantized, lora_init.QPiSSA()),
      'PiSSA': make(floats, lora_init.PiSSA()), 'Random': make(floats, lora_init.Random(lora_init.gaussian))}


@pytest.mark.parametrize('name', ['LoftQ', 'QPiSSA'])
def test_a_model_starts_from_codes_and_adapters_near_its_weights(name):
  """Whatever s is, here 4: the outputs are nearer to the float model's than those of plain rounding."""
  floats, frozen, models = started()
  model = models[name]
  assert all(isinstance(vars(layer)['kernel'], weights.Codes) for layer in (model.first, model.stack))
  w, kernel = floats.first.kernel[...], vars(model.first)['kernel'].get_value()
  one = lora.adapters(model)['first']['default']
  error = np.linalg.norm(w - qarray.decode(kernel) - 4 * one.A[...] @ one.B[...])
  assert error < 0.8 * np.linalg.norm(w - frozen.first.kernel[...])
  for i in range(2):                                                       # Each matrix of a stack by itself.
    merged = merge.merge(model).stack.kernel[i]
    want = floats.stack.kernel[i]
    assert np.linalg.norm(merged - want) < np.linalg.norm(frozen.stack.kernel[i] - want)


def test_pissa_leaves_the_float_model_as_it_was():
  floats, _, models = started()
  x = jax.random.normal(jax.random.key(1), (3, 64))
  apply = nnx.jit(lambda model, x: model(x))
  want = apply(floats, x)
  np.testing.assert_allclose(apply(models['PiSSA'], x), want, atol=2e-5)
  assert not np.allclose(vars(models['PiSSA'].first)['kernel'][...], floats.first.kernel[...])
  np.testing.assert_array_equal(apply(models['Random'], x), want)


def test_dora_starts_at_the_lengths_of_codes_and_adapters():
  quantized = qat.quantize(Two(nnx.Rngs(0)), [qat.Rule('.*', weight=STE(specs.integer(2, (16, 1))))])
  model = lora.lora(quantized, ['first'], 8, 8.0, init=lora_init.LoftQ(1), dora=True)
  one, q = lora.adapters(model)['first']['default'], vars(model.first)['kernel'].get_value()
  want = np.linalg.norm(qarray.decode(q) + one.A[...] @ one.B[...], axis=0)
  np.testing.assert_allclose(one.magnitude[...], want, rtol=1e-5)
  np.testing.assert_allclose(adapters.gain(qarray.decode(q), [one]), np.ones(48), rtol=1e-5)


@pytest.mark.parametrize('init, freeze, options, message', [
    (lora_init.LoftQ(), True, {}, "Layer 'first': LoftQ.* starts from the float weight, and the layer is frozen"),
    (lora_init.PiSSA(), True, {}, 'is frozen'),
    (lora_init.LoftQ(), None, {}, 'no weight quantizer that refits'),
    (lora_init.QPiSSA(), False, dict(group=4), 'starts A with 64 inputs, and pooling leaves 16')])
def test_starts_that_lack_their_floats_or_their_grid_are_errors(init, freeze, options, message):
  model = Two(nnx.Rngs(0))
  if freeze is not None:
    model = qat.quantize(model, [qat.Rule('.*', weight=STE(specs.integer(2, (16, 1))))])
  with pytest.raises(ValueError, match=message):
    lora.lora(qat.freeze(model) if freeze else model, ['first'], 8, 8.0, init=init, **options)
