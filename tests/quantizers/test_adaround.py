"""AdaRound against Nagel et al. 2020 (https://arxiv.org/abs/2004.10568), Eqs. 22-24."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, ranges, rounding, specs
from qat.quantizers import adaround, base

INT3 = specs.integer(3, specs.CHANNEL)
W = jax.random.normal(jax.random.key(0), (32, 8))
sigmoid = lambda v: 1 / (1 + np.exp(-v))


def test_h_is_eq_23_and_its_inverse_starts_at_the_fraction():
  V = np.linspace(-6, 6, 101)
  np.testing.assert_allclose(adaround.h(jnp.float32(V)), np.clip(sigmoid(V) * 1.2 - 0.1, 0, 1), atol=1e-6)
  fraction = jnp.linspace(0, 1, 41)
  np.testing.assert_allclose(adaround.h(adaround.h_inverse(fraction)), fraction, atol=1e-6)


def test_the_soft_weight_starts_as_the_weight_and_is_eq_22():
  quantizer = adaround.AdaRound(INT3).for_weight(W)
  soft = quantizer.relaxed()
  s, V = np.asarray(quantizer.scale[...]), np.asarray(quantizer.V[...])
  np.testing.assert_allclose(soft(W), np.clip(np.asarray(W) / s, -4, 3) * s, atol=1e-5)
  V = V + np.random.default_rng(0).normal(size=V.shape)
  soft.V[...] = jnp.float32(V)
  want = s * np.clip(np.floor(np.asarray(W) / s) + np.clip(sigmoid(V) * 1.2 - 0.1, 0, 1), -4, 3)
  np.testing.assert_allclose(soft(W), want, atol=1e-5)


def test_the_gradient_of_V_is_s_times_that_of_h():
  """Of the soft and of the hard form; none where the weight is clipped or h has arrived."""
  quantizer = adaround.AdaRound(INT3, ranges.Search(lowest=0.4, steps=2)).for_weight(W)
  quantizer.V[...] = 3 * jax.random.normal(jax.random.key(1), W.shape)
  s, V, u = (np.float64(a) for a in (quantizer.scale[...], quantizer.V[...], W / quantizer.scale[...]))
  moves = (np.abs(1.2 * (sigmoid(V) - 0.5)) < 0.5) & (np.floor(u) >= -4) & (np.floor(u) < 3)
  want = s * 1.2 * sigmoid(V) * (1 - sigmoid(V)) * moves
  assert 0.2 < moves.mean() < 0.9
  for form in (quantizer, quantizer.relaxed()):
    got = nnx.grad(lambda q: q(W).sum())(form)['V'][...]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_regularizer_is_eq_24_and_beta_anneals():
  V = jax.random.normal(jax.random.key(0), (5, 4))
  H = np.clip(sigmoid(np.float64(V)) * 1.2 - 0.1, 0, 1)
  for beta in (20.0, 2.0):
    np.testing.assert_allclose(adaround.regularizer(V, beta), np.sum(1 - np.abs(2 * H - 1) ** beta), rtol=1e-5)
  betas = [float(adaround.annealed(jnp.float32(p))) for p in (0, 0.2, 0.6, 1)]
  np.testing.assert_allclose(betas, [20, 20, 11, 2], atol=1e-5)
  soft = adaround.AdaRound(INT3).for_weight(W).relaxed()
  assert soft.penalty(jnp.float32(0.19)) == 0
  np.testing.assert_allclose(soft.penalty(jnp.float32(1)), 0.01 * adaround.regularizer(soft.V[...], 2.0), rtol=1e-6)


SPECS = {'int2 a tensor': specs.integer(2, specs.TENSOR), 'affine': specs.affine(3, (8, 1)),
         'nf4': qarray.Spec(codebooks.NF4, (16, 1)), 'fp4': specs.kernel(specs.NVFP4), 'q4_1': specs.kernel(specs.Q4_1),
         'ternary': qarray.Spec(formats.TERNARY, specs.CHANNEL)}


@pytest.mark.parametrize('name', SPECS)
def test_it_starts_from_round_to_nearest(name):
  spec = SPECS[name]
  quantizer = adaround.AdaRound(spec).for_weight(W)
  near = qarray.encode(W, spec, *ranges.Search()(W, spec))
  np.testing.assert_array_equal(quantizer.encode(W).codes, near.codes)


@pytest.mark.parametrize('name', SPECS)
@pytest.mark.parametrize('towards', [rounding.floor, rounding.ceil])
def test_it_starts_at_codes_of_neighbours(name, towards):
  spec = SPECS[name]
  q = qarray.encode(W, spec, *ranges.Search()(W, spec), rounding=towards)
  got = adaround.AdaRound(spec).starting_at(W, q)
  np.testing.assert_array_equal(got.encode(W).codes, q.codes)


@pytest.mark.parametrize('spec', [specs.integer(4, (8, 1)), specs.affine(3, (8, 1))])
def test_it_starts_at_any_codes_of_integers_and_can_still_move(spec):
  q = qarray.encode(jax.random.normal(jax.random.key(7), W.shape), spec)  # Of another matrix.
  quantizer = adaround.AdaRound(spec).starting_at(W, q)
  got = quantizer.encode(W)
  np.testing.assert_array_equal(got.codes, q.codes)
  np.testing.assert_array_equal(qarray.decode(got), qarray.decode(q))
  free = np.asarray(nnx.grad(lambda q: q(W).sum())(quantizer)['V'][...]) > 0
  assert free.mean() > 0.5


def test_each_matrix_of_a_stack_is_as_alone():
  w = jnp.stack([W, 3 * W[::-1]])
  stack = adaround.AdaRound(INT3).for_weight(w)
  for i in range(2):
    alone = adaround.AdaRound(INT3).for_weight(w[i])
    np.testing.assert_allclose(stack.V[i], alone.V[...], atol=1e-5)
    np.testing.assert_array_equal(stack.scale[i], alone.scale[...])


def test_relaxed_and_settled_share_what_is_learned():
  quantizer = adaround.AdaRound(INT3).for_weight(W)
  soft = quantizer.relaxed()
  soft.V[...] = -soft.V[...]
  hard = soft.settled()
  assert type(hard) is adaround.AdaRound and soft.relaxed() is soft and hard.settled() is hard
  np.testing.assert_array_equal(hard.V[...], soft.V[...])
  np.testing.assert_array_equal(qarray.decode(soft.encode(W)), soft(W))
  assert len(jax.tree.leaves(nnx.state(hard.frozen(), nnx.Param))) == 0
  np.testing.assert_array_equal(hard.frozen().encode(W).codes, hard.encode(W).codes)


def test_hardening_fixes_a_share_those_nearest_to_an_end():
  V = jax.random.normal(jax.random.key(0), (10, 10))
  got = np.asarray(adaround.harden(V, 0.3))
  fixed = np.abs(got) == adaround.FAR
  assert fixed.sum() in (30, 31) and np.abs(V)[fixed].min() >= np.abs(V)[~fixed].max()
  np.testing.assert_array_equal(np.sign(got), np.sign(V))
  assert (np.abs(adaround.harden(V, 1.0)) == adaround.FAR).all()
  np.testing.assert_array_equal(adaround.h(jnp.float32([-adaround.FAR, adaround.FAR])), [0, 1])
  assert isinstance(adaround.AdaRound(INT3).for_weight(W).V, base.Rounding)
