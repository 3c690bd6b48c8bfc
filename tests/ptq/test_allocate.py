"""Allocations against brute force, and the recipes that come of them."""

import itertools
import re

from flax import nnx
import jax
import numpy as np
import pytest

from qat.core import specs
from qat.nn import explain, recipes, rules, transform
from qat.ptq import allocate, named, sensitivity, walk
from qat.quantizers import ste
from tests.nn import zoo

BITS = {'w2': 2, 'w3': 3, 'w4': 4, 'w8': 8}


def problem(seed, layers=8, spread=1.0):
  """Costs that fall with bits, over many orders of magnitude, and layers of different sizes."""
  rng = np.random.default_rng(seed)
  names = [f'layers/{i}' for i in range(layers)]
  counts = rng.integers(100, 5000, layers)
  costs = {n: {c: float(np.exp(rng.normal() * spread) * 4.0**-b) for c, b in BITS.items()} for n in names}
  sizes = {n: {c: allocate.Size(int(k), int(k) * b + 64) for c, b in BITS.items()} for n, k in zip(names, counts)}
  return costs, sizes


def least(costs, sizes, allowed):
  """The least cost of all 4^8 allocations within `allowed` bits."""
  table = lambda of: np.array([[of(n, c) for c in BITS] for n in costs])
  c, s = table(lambda n, c: costs[n][c]), table(lambda n, c: sizes[n][c].bits)
  every = np.array(list(itertools.product(range(4), repeat=len(costs))))
  rows = np.arange(len(costs))
  total, bits = c[rows[None], every].sum(1), s[rows[None], every].sum(1)
  return total[bits <= allowed].min()


def cost_and_bits(choice, costs, sizes):
  return sum(costs[n][c] for n, c in choice.items()), sum(sizes[n][c].bits for n, c in choice.items())


@pytest.mark.parametrize('spread', [0.5, 3.0, 8.0, 20.0])
@pytest.mark.parametrize('seed', range(6))
def test_brute_force_of_eight_layers(seed, spread):
  costs, sizes = problem(seed, spread=spread)
  weights = sum(row['w2'].weights for row in sizes.values())
  for budget in (allocate.BitsPerWeight(2.5), allocate.BitsPerWeight(4.0), allocate.Bytes(weights * 6 / 8)):
    cost, bits = cost_and_bits(allocate.allocate(costs, sizes, budget), costs, sizes)
    assert bits <= budget.bits(weights)
    np.testing.assert_allclose(cost, least(costs, sizes, budget.bits(weights)), rtol=1e-9)


def test_budgets_at_the_ends():
  costs, sizes = problem(0)
  weights = sum(row['w2'].weights for row in sizes.values())
  smallest, largest = (sum(row[c].bits for row in sizes.values()) for c in ('w2', 'w8'))
  tight = allocate.allocate(costs, sizes, allocate.Bytes(smallest / 8))
  assert set(tight.values()) == {'w2'}
  falling = {n: dict(zip(BITS, sorted(row.values(), reverse=True))) for n, row in costs.items()}
  assert set(allocate.allocate(falling, sizes, allocate.Bytes(largest / 8)).values()) == {'w8'}
  says = f'{smallest / weights:.4f} bits per weight, {smallest / 8:,.0f} bytes'
  with pytest.raises(ValueError, match=re.escape(says)):
    allocate.allocate(costs, sizes, allocate.BitsPerWeight(smallest / weights - 1e-3))
  with pytest.raises(ValueError, match='cannot be met'):
    allocate.allocate(costs, sizes, allocate.BitsPerWeight(float('nan')))


def test_large_layers_keep_to_the_budget_to_the_bit():
  """Sizes of a real network, one of which is a bit too large for everything else."""
  costs, _ = problem(1, layers=3)
  sizes = {n: {c: allocate.Size(10**9, 10**9 * b + i) for c, b in BITS.items()} for i, n in enumerate(costs)}
  at_most = 3 * 10**9 * 4  # Three layers of 4 bits, and 3 bits of overhead: one layer must give way.
  choice = allocate.allocate(costs, sizes, allocate.Bytes(at_most / 8))
  cost, bits = cost_and_bits(choice, costs, sizes)
  assert bits <= at_most
  np.testing.assert_allclose(cost, least(costs, sizes, at_most), rtol=1e-9)


def test_costs_below_zero_and_of_zero():
  costs, sizes = problem(2)
  lower = {n: {c: cost - 7.0 for c, cost in row.items()} for n, row in costs.items()}
  budget = allocate.BitsPerWeight(3.5)
  assert allocate.allocate(lower, sizes, budget) == allocate.allocate(costs, sizes, budget)
  free = {n: dict.fromkeys(row, 0.0) for n, row in costs.items()}
  assert set(allocate.allocate(free, sizes, budget)) == set(costs)


def test_layers_may_have_candidates_of_their_own():
  costs, sizes = problem(3)
  costs['layers/0'] = {'w8': costs['layers/0']['w8']}
  assert allocate.allocate(costs, sizes, allocate.BitsPerWeight(4.0))['layers/0'] == 'w8'


def test_wrong_costs():
  costs, sizes = problem(0)
  budget = allocate.BitsPerWeight(4.0)
  with pytest.raises(ValueError, match="'w3' of layer 'layers/2' costs nan"):
    allocate.allocate(costs | {'layers/2': costs['layers/2'] | {'w3': float('nan')}}, sizes, budget)
  with pytest.raises(ValueError, match="'w5' of layer 'layers/2' has a cost and no size"):
    allocate.allocate(costs | {'layers/2': {'w5': 1.0}}, sizes, budget)
  with pytest.raises(ValueError, match=r"no candidate for \['layers/2'\]"):
    allocate.allocate(costs | {'layers/2': {}}, sizes, budget)
  with pytest.raises(ValueError, match='no candidate for any layer'):
    allocate.allocate({}, sizes, budget)


CANDIDATES = {'w4': recipes.weight_only(4), 'w8a8': recipes.get('w8a8'), 'float': recipes.get('float')}


@pytest.mark.parametrize('name', ['containers', 'scanned', 'shared', 'tied', 'bare @'])
def test_sizes_are_those_that_explain_prints(name):
  model = zoo.MODELS[name](nnx.Rngs(0))
  got = allocate.sizes(model, CANDIDATES)
  assert list(got) == list(allocate.places(model))
  for candidate, recipe in CANDIDATES.items():
    rows = {r.path: r for r in explain.explain(transform.quantize(model, recipe)).rows if r.size_bytes}
    for path, row in got.items():
      assert row[candidate].bits == 8 * rows[path].size_bytes
      assert row[candidate].weights == np.prod(rows[path].shape)


def test_a_recipe_gives_each_layer_its_choice():
  """In a model whose paths hold letters that mean something to regular expressions."""
  model = zoo.Containers(nnx.Rngs(0))
  model.named['up.2'] = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
  model.named['upx2'] = nnx.Linear(8, 8, rngs=nnx.Rngs(2))
  choice = dict(zip(allocate.places(model), itertools.cycle(CANDIDATES)))
  mixed = transform.quantize(model, allocate.recipe(choice, CANDIDATES, model))
  rows = {r.path: r for r in explain.explain(mixed).rows}
  for path, candidate in choice.items():
    bits = dict(w4='INT4', w8a8='INT8', float='-')[candidate]
    assert bits in rows[path].weight
    assert (rows[path].input != '-') == (candidate == 'w8a8' and rows[path].kind == 'Linear')
  assert len({choice['named/up.2'], choice['named/upx2']}) == 2


def test_layers_that_share_a_param_share_its_choice():
  model, x = zoo.Shared(nnx.Rngs(0)), zoo.example('shared')
  assert list(allocate.places(model)) == ['a']
  mixed = transform.quantize(model, allocate.recipe({'a': 'w4'}, CANDIDATES, model))
  whole = transform.quantize(model, CANDIDATES['w4'])
  np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(mixed, x), nnx.jit(lambda m, x: m(x))(whole, x))


class Backwards(nnx.Module):
  """The first layer to be defined comes last in the alphabet, and so in copies of the model."""

  def __init__(self):
    self.z = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    self.m = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
    self.a = nnx.Linear(8, 8, rngs=nnx.Rngs(2))
    self.a.kernel = self.z.kernel

  def __call__(self, x):
    return self.a(nnx.relu(self.m(nnx.relu(self.z(x)))))


def test_layers_keep_their_names_in_copies():
  model, x = Backwards(), zoo.example('shared')
  assert list(allocate.sizes(model, CANDIDATES)) == ['z', 'm']
  costs = sensitivity.noise(model, CANDIDATES, [x])
  assert list(costs) == ['z', 'm'] and costs['z']['w4'] != costs['m']['w4']
  assert list(sensitivity.fisher(model, CANDIDATES, [x], lambda m, x: (m(x)**2).mean())) == ['z', 'm']
  mixed = transform.quantize(model, allocate.recipe({'z': 'w4', 'm': 'w8a8'}, CANDIDATES, model))
  bits = {r.path: r.weight for r in explain.explain(mixed).rows}
  assert 'INT4' in bits['z'] and 'INT4' in bits['a'] and 'INT8' in bits['m']


def test_rules_by_kind_and_path_are_those_of_the_layer():
  conv, linear = ste.STE(specs.integer(4, (None, 1))), ste.STE(specs.integer(8, (None, 1)))
  candidate = (rules.Rule('b/.*'), rules.Rule('.*', conv, kind='Conv'), rules.Rule('.*', linear))
  linears = [nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(2)]
  model = nnx.Dict({'a': nnx.Conv(2, 3, (2,), rngs=nnx.Rngs(2)), 'b': nnx.Dict({'c': linears[0]}), 'd': linears[1]})
  made = allocate.recipe({'a': 'mix', 'b/c': 'mix', 'd': 'mix'}, {'mix': candidate}, model)
  assert [(r.path, r.weight, r.kind) for r in made] == [('a', conv, '.*'), ('b/c', None, '.*'), ('d', linear, '.*')]


def test_a_choice_for_another_model():
  model = zoo.Tied(nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"names \['head'\], and the model has \['embed'\]"):
    allocate.recipe({'head': 'w4'}, CANDIDATES, model)


def test_the_recipe_trains_and_freezes():
  model, x = zoo.Containers(nnx.Rngs(0)), zoo.example('containers')
  choice = dict(zip(allocate.places(model), itertools.cycle(['w4', 'w8a8'])))
  q = transform.quantize(model, allocate.recipe(choice, CANDIDATES, model))
  grads = nnx.jit(nnx.grad(lambda m, x: (m(x)**2).sum()))(q, x)
  assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
  run = nnx.jit(lambda m, x: m(x))
  np.testing.assert_array_equal(run(q, x), run(transform.freeze(q), x))


def test_post_training_quantization_takes_the_recipe():
  model, x = zoo.Containers(nnx.Rngs(0)), zoo.example('containers')
  choice = dict(zip(allocate.places(model), itertools.cycle(['w4', 'w8a8'])))
  q = transform.quantize(model, allocate.recipe(choice, CANDIDATES, model))
  frozen, coverage = walk.walk(q, model, [x], named.named('rtn'))
  rows = {r.path: r for r in explain.explain(frozen).rows}
  assert set(coverage) == set(choice)
  for path, name in choice.items():
    assert ('codes Spec(INT4' if name == 'w4' else 'codes Spec(INT8') in rows[path].weight
