"""What is true of every quantizer. A new one joins with a line of MEMBERS."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, qarray, ranges, specs
from qat.quantizers import adaround, autoround, base, bitnet, dorefa, efficient, flexround, lsq, lwc, pact, qdrop
from qat.quantizers import static, stochastic
from qat.quantizers.ste import STE


def kernel(quantizer):
  """Of a weight."""
  return lambda w: quantizer.for_weight(w)


def tokens(quantizer):
  """Of an input, found anew for each."""
  return lambda x: quantizer.for_input(())


def calibrated(quantizer):
  """Of an input, whose range an observer found in half of it."""
  def make(x):
    state = quantizer.observer.init((1, 1), quantizer.spec.block)
    state = quantizer.observer.update(state, x / 2, quantizer.spec.block)
    scale, zero = quantizer.observer.fit(state, quantizer.spec)
    return quantizer.for_input((), *(a if a is None else a[0, 0] for a in map(qarray.decode, (scale, zero))))
  return make


INT4 = qarray.Spec(formats.INT4, specs.CHANNEL)
UINT4 = specs.integer(4, specs.TENSOR, signed=False)
MEMBERS = {
    'ste, int4': kernel(STE(INT4)), 'ste, int8': kernel(STE(specs.integer(8, (32, 1)))),
    'ste, int8 a token': tokens(STE(specs.integer(8, specs.TOKEN, narrow=True))),
    'ste, ternary': kernel(STE(qarray.Spec(formats.TERNARY, specs.CHANNEL))),
    'ste, nf4': kernel(STE(specs.kernel(specs.NF4))),
    'ste, nf4 twice': kernel(STE(specs.kernel(specs.NF4_DQ), ranges.centered)),
    'ste, nf4 a channel': kernel(STE(qarray.Spec(codebooks.NF4, specs.CHANNEL))),
    'ste, mxfp4': kernel(STE(specs.kernel(specs.MXFP4), ranges.ocp_floor)),
    'ste, mxfp4 of inputs': tokens(STE(specs.MXFP4, ranges.ocp_floor)),
    'ste, nvfp4': kernel(STE(specs.kernel(specs.NVFP4))), 'ste, nvfp4 of inputs': tokens(STE(specs.NVFP4)),
    'ste, affine': kernel(STE(specs.affine(4, (32, 1)))),
    'ste, q4_0': kernel(STE(specs.kernel(specs.Q4_0), ranges.signed_extreme)),
    'ste, q4_1': kernel(STE(specs.kernel(specs.Q4_1))),
    'ste, fp8': tokens(STE(qarray.Spec(formats.FP8_E4M3, specs.TOKEN))),
    'static, weight': kernel(static.Static(INT4)), 'static, nvfp4': kernel(static.Static(specs.kernel(specs.NVFP4))),
    'static, input': calibrated(static.Static(specs.integer(8, specs.TENSOR))),
    'static, affine input': calibrated(static.Static(specs.affine(8, specs.TENSOR))),
    'lsq, int4': kernel(lsq.LSQ(INT4)), 'lsq, int2': kernel(lsq.LSQ(specs.integer(2, specs.CHANNEL))),
    'lsq, int4 a tensor': kernel(lsq.LSQ(specs.integer(4, specs.TENSOR))),
    'lsq, step in float16': kernel(lsq.LSQ(qarray.Spec(formats.INT4, (32, 1), specs.F16))),
    'lsq, fp4 in runs': kernel(lsq.LSQ(specs.kernel(specs.FP4_BNB))),
    'lsq, input': calibrated(lsq.LSQ(specs.integer(4, specs.TENSOR))),
    'lsq, unsigned input': calibrated(lsq.LSQ(UINT4)),
    'pact': tokens(pact.PACT(4, alpha=0.8)),
    'dorefa, 1 bit': kernel(dorefa.DoReFaWeight(1)), 'dorefa, 2 bits': kernel(dorefa.DoReFaWeight(2)),
    'dorefa, 4 bits': kernel(dorefa.DoReFaWeight(4)), 'dorefa, input': tokens(dorefa.DoReFaInput(4)),
    'stochastic': kernel(stochastic.StochasticRounding(INT4)),
    'stochastic input': tokens(stochastic.StochasticRounding(specs.integer(8, specs.TOKEN), seed=3)),
    'adaround': kernel(adaround.AdaRound(specs.integer(3, (32, 1)))),
    'adaround, affine a tensor': kernel(adaround.AdaRound(specs.affine(2, specs.TENSOR))),
    'adaround, nvfp4': kernel(adaround.AdaRound(specs.kernel(specs.NVFP4))),
    'adaround, nf4 in runs': kernel(adaround.AdaRound(specs.kernel(specs.NF4))),
    'adaround, from codes': lambda w: adaround.AdaRound(INT4).starting_at(w, qarray.encode(w[::-1], INT4)),
    'signround': kernel(autoround.SignRound(specs.integer(3, specs.CHANNEL))),
    'signround, affine': kernel(autoround.SignRound(specs.affine(4, (32, 1)))),
    'signround, q4_1': kernel(autoround.SignRound(specs.kernel(specs.Q4_1))),
    'signround, mxfp4': kernel(autoround.SignRound(specs.kernel(specs.MXFP4), ranges.ocp_floor)),
    'signround, from codes': lambda w: autoround.SignRound(INT4).starting_at(w, qarray.encode(w[::-1], INT4)),
    'flexround': kernel(flexround.FlexRound(INT4)),
    'flexround, affine': kernel(flexround.FlexRound(specs.affine(4, (32, 1)))),
    'lwc': kernel(lwc.LWC(INT4)), 'lwc, affine': kernel(lwc.LWC(specs.affine(3, (32, 1)))),
    'learned grid': kernel(efficient.LearnedGrid(INT4)),
    'learned grid, affine': kernel(efficient.LearnedGrid(specs.affine(2, (32, 1)), ranges.Search())),
    'qdrop': calibrated(qdrop.QDrop(lsq.LSQ(specs.integer(4, specs.TENSOR)))),
    'bitnet, weight': kernel(bitnet.weight()), 'bitnet, input': tokens(bitnet.input()),
}

# One of each quantizer and, of those that take many, of each kind of grid: those that are tried everywhere.
FEW = ('ste, int4', 'ste, int8 a token', 'ste, nf4 twice', 'ste, nvfp4', 'ste, affine', 'ste, fp8', 'static, weight',
       'static, affine input', 'lsq, int4', 'lsq, unsigned input', 'pact', 'dorefa, 1 bit', 'dorefa, input',
       'stochastic', 'stochastic input', 'adaround', 'signround, affine', 'flexround', 'lwc', 'learned grid, affine',
       'qdrop', 'bitnet, weight', 'bitnet, input')
LEARNS_STEPS = ('lsq', 'pact', 'signround', 'flexround', 'lwc', 'learned grid', 'qdrop')


def example(dtype):
  return jax.random.normal(jax.random.key(0), (64, 32), dtype)


def value(q, x):
  return jnp.sum(jnp.sin(q(x).astype(jnp.float32)))


@nnx.jit
def trained(members, x):
  """The value and its gradients, by the quantizer's parameters and by x."""
  return ({n: q(x) for n, q in members.items()},
          {n: nnx.grad(value, argnums=(0, 1))(q, x) for n, q in members.items()})


@nnx.jit
def served(members, x):
  return {n: qarray.decode(q.encode(x), x.dtype) for n, q in members.items()}


@nnx.jit
def transformed(members, x):
  """The gradient by x within vmap, scan and remat."""
  def forms(q):
    graph, state = nnx.split(q)
    loss = lambda x: value(nnx.merge(graph, state), x)
    slope = jax.grad(loss)
    yield 'plain', slope(x)
    yield 'vmap', jax.vmap(slope)(jnp.stack([-x, x]))[1]
    yield 'scan', jax.lax.scan(lambda carry, x: (carry, slope(x)), (), jnp.stack([-x, x]))[1][1]
    yield 'remat', jax.grad(jax.checkpoint(loss))(x)
  return {n: dict(forms(q)) for n, q in members.items()}


def group(name, dtype):
  """The members that are compiled with one: all in float32, FEW or all others in bfloat16."""
  return tuple(n for n in MEMBERS if dtype == 'float32' or (n in FEW) == (name in FEW))


def results(name, dtype):
  return results_of(group(name, dtype), dtype)


@functools.cache
def results_of(names, dtype):
  x = example(jnp.dtype(dtype))
  members = nnx.Dict({n: MEMBERS[n](x) for n in names})
  return members, x, *trained(members, x), served(members, x), served(
      nnx.Dict({n: q.frozen() for n, q in members.items()}), x)


def few(*rest):
  """Parameters (rest, name) for every member, slow for all but FEW."""
  return [pytest.param(*rest, n, marks=[] if n in FEW else [pytest.mark.slow]) for n in MEMBERS]


members_and_types = pytest.mark.parametrize('dtype, name', [('float32', n) for n in MEMBERS] + few('bfloat16'))


@members_and_types
def test_trains_as_it_serves(dtype, name):
  members, x, trained, _, served, frozen = results(name, dtype)
  assert trained[name].dtype == x.dtype and trained[name].shape == x.shape
  np.testing.assert_array_equal(trained[name], served[name])
  if not name.startswith('stochastic'):  # Which round to nearest when they are frozen.
    np.testing.assert_array_equal(trained[name], frozen[name])


@members_and_types
def test_trains_as_it_serves_without_jit(dtype, name):
  members, x, *_ = results(name, dtype)
  np.testing.assert_array_equal(members[name](x), qarray.decode(members[name].encode(x), x.dtype))


@members_and_types
def test_gradients_are_finite_and_every_parameter_learns(dtype, name):
  members, x, _, gradients, *_ = results(name, dtype)
  for g in jax.tree.leaves(gradients[name]):
    assert np.isfinite(np.asarray(g, np.float32)).all() and np.asarray(g, np.float32).any()
  by_parameter, by_x = gradients[name]
  assert by_x.dtype == x.dtype
  assert nnx.to_pure_dict(by_parameter).keys() == nnx.to_pure_dict(nnx.state(members[name], nnx.Param)).keys()


@functools.cache
def in_transformations(is_few):
  members, x, *_ = results('', 'float32')
  return transformed(nnx.Dict({n: q for n, q in members.items() if (n in FEW) == is_few}), x)


@pytest.mark.parametrize('form, name', [case for form in ('vmap', 'scan', 'remat') for case in few(form)])
def test_works_in_transformations(form, name):
  got = in_transformations(name in FEW)[name]
  np.testing.assert_allclose(got[form], got['plain'], rtol=1e-5, atol=1e-6)  # A value off its grid is 0.1 off.


def test_compiles_once():
  members, x, *_ = results('', 'float32')
  members, traces = nnx.clone(members), []

  @nnx.jit
  def step(members, x):
    traces.append(1)
    gradients = nnx.grad(lambda members: sum(value(q, x) for q in members.values()))(members)
    nnx.update(members, jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(members, nnx.Param), gradients))
    for q in members.values():
      q.advance()

  before = jax.tree.map(np.asarray, nnx.state(members, base.StepSize))
  for i in range(3):
    step(members, x + i)
  assert len(traces) == 1
  moved = jax.tree.map(lambda a, b: (np.asarray(a) != b).any(), nnx.state(members, base.StepSize), before)
  assert all(jax.tree.leaves(moved))
  assert set(moved) == {n for n in MEMBERS if n.startswith(LEARNS_STEPS)}


@pytest.mark.parametrize('quantizer', [static.Static(UINT4), lsq.LSQ(UINT4)], ids=['static', 'lsq'])
def test_a_prototype_says_what_it_lacks(quantizer):
  with pytest.raises(ValueError, match=r'has no range yet.*Call qat\.calibrate'):
    quantizer(example(jnp.float32))
