"""Bit allocation: the candidate of each layer that costs least under a budget, by integer linear programming.

Yao et al. HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021, Sec. 3.4. https://arxiv.org/abs/2011.10680

Differences from the paper: costs are any of qat/ptq/sensitivity.py; candidates are recipes and not bits; the budget
is of bits of storage, scales and zeros included, and not of operations or of time.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np
from scipy import optimize

from qat.nn import quantized, rules, transform, weights


class Size(NamedTuple):
  """What a layer takes under a candidate."""
  weights: int
  bits: int


@dataclasses.dataclass(frozen=True)
class BitsPerWeight:
  """A budget: bits of storage a weight, scales and zeros included, over the layers that are allocated."""
  value: float

  def bits(self, weights):
    return self.value * weights


@dataclasses.dataclass(frozen=True)
class Bytes:
  """A budget: bytes of storage of the layers that are allocated."""
  value: float

  def bits(self, weights):
    return 8 * self.value


def places(model):
  """{path: Site} of every weight that can be put on a grid; of layers that share one, the first."""
  seen = {}
  for site in weight_sites(model).values():
    seen.setdefault(id(site.variable), site)
  return {site.path: site for site in seen.values()}


def weight_sites(model):
  """{path: Site} of every layer with a weight. Copies of a model may have them in another order."""
  return {site.path: site for site in rules.sites(model) if site.name is not None}


def sizes(model, candidates):
  """What each weight takes under each candidate.

  Args:
    model: in floats.
    candidates: {name: recipe}.

  Returns:
    {path: {name: Size}}, of packed codes with their scales and zeros.
  """
  found = {path: {} for path in places(model)}
  for name, candidate in candidates.items():
    quantized_sites = weight_sites(transform.quantize(model, candidate))
    for path in found:
      site = quantized_sites[path]
      array = site.variable.get_value()
      weight = weight_of(site)
      bits = weights.shapes(weight, site.variable).nbits if weight else 8 * array.nbytes
      found[path][name] = Size(array.size, math.ceil(bits))
  return found


def weight_of(site):
  """The weights.Weight of a site, or None where no quantizer reads it."""
  q = quantized.of(site.module)
  return q and vars(q.weights).get(site.name)


def allocate(costs, sizes, budget):
  """The candidates that cost least together.

  Args:
    costs: {layer: {candidate: cost}}, of qat/ptq/sensitivity.py; layers may differ in their candidates.
    sizes: {layer: {candidate: Size}}, of those and maybe more.
    budget: BitsPerWeight or Bytes.

  Returns:
    {layer: candidate}.

  >>> size = {'w2': Size(100, 200), 'w8': Size(100, 800)}
  >>> cost = {'first': {'w2': 9.0, 'w8': 0.1}, 'last': {'w2': 1.0, 'w8': 0.0}}
  >>> allocate(cost, {'first': size, 'last': size}, BitsPerWeight(5))
  {'first': 'w8', 'last': 'w2'}
  """
  _check(costs, sizes)
  bits = {layer: {name: sizes[layer][name].bits for name in row} for layer, row in costs.items()}
  allowed, smallest = _limits(bits, sizes, budget)
  pairs = [(layer, name) for layer, row in costs.items() for name in row]
  # Only differences from each layer's best matter.
  cost = np.array([costs[layer][name] - min(costs[layer].values()) for layer, name in pairs], np.float64)
  more = [bits[layer][name] - min(bits[layer].values()) for layer, name in pairs]
  unit = math.gcd(*more) or 1
  one_each = np.array([[own == layer for own, _ in pairs] for layer in costs], np.float64)
  on = _least(cost, [m // unit for m in more], one_each, math.floor((allowed - smallest) / unit))
  return {layer: name for (layer, name), chosen in zip(pairs, on) if chosen}


def _least(cost, more, one_each, room):
  """Which pairs cost least together: bool[pairs].

  HiGHS calls 1e-6 a whole number, so it sees no cost below 1e-6 of the largest. A pair that costs more than a whole
  allocation is in no better one: without such pairs it is asked again.

  Args:
    cost: f64[pairs], 0 or more.
    more: [pairs] of int.
    one_each: f64[layers, pairs], 1 where the pair is of the layer.
    room: int, what `more` of the chosen pairs may add up to.
  """
  best, may = None, np.ones(len(cost), bool)
  while True:
    on = _within(np.where(may, cost, 0) / (cost[may].max() or 1.0), more, one_each, room, may)
    best = on if best is None or cost[on].sum() < cost[best].sum() else best
    fewer = may & (cost <= cost[best].sum())
    if (fewer == may).all():
      return best
    may = fewer


def _within(cost, more, one_each, room, may):
  """HiGHS's choice among the pairs of `may`, and within `room` to the last unit."""
  limit = room
  while True:
    constraints = [optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(more, -np.inf, limit + 0.5)]
    x = optimize.milp(1e6 * cost, integrality=np.ones(len(cost)), bounds=optimize.Bounds(0, may.astype(float)),
                      constraints=constraints, options=dict(mip_rel_gap=0)).x
    on = x > 0.5
    over = sum(m for m, chosen in zip(more, on) if chosen) - room
    if over <= 0:
      return on
    limit = max(0, limit - over)


def _check(costs, sizes):
  """Raises at costs that are empty, not finite, or of layers or candidates without a size."""
  if not costs or not all(costs.values()):
    bare = [layer for layer, row in costs.items() if not row] or 'any layer'
    raise ValueError(f'allocate was given no candidate for {bare}. Give each layer at least one.')
  for layer, row in costs.items():
    for name, cost in row.items():
      if name not in sizes.get(layer, {}):
        raise ValueError(f"Candidate {name!r} of layer '{layer}' has a cost and no size; sizes are of "
                         f'{sorted(sizes.get(layer, {})) or sorted(sizes)}. Make both from the same candidates.')
      if not math.isfinite(cost):
        raise ValueError(f"Candidate {name!r} of layer '{layer}' costs {cost}: costs are finite. Drop the candidate, "
                         'or look at what it does to the layer.')


def _limits(bits, sizes, budget):
  """(bits allowed, bits of the smallest allocation); raises where the second is more."""
  count = sum(sizes[layer][name].weights for layer, row in bits.items() for name in list(row)[:1])
  allowed, smallest = budget.bits(count), sum(min(row.values()) for row in bits.values())
  if not smallest <= allowed:
    raise ValueError(f'{budget} cannot be met: the smallest candidates take {smallest / count:.4f} bits per weight, '
                     f'{smallest / 8:,.0f} bytes in all. Allow that much, or add candidates of fewer bits.')
  return allowed, smallest


def recipe(choice, candidates, model):
  """The Rules of an allocation, for qat.quantize and so for QAT and PTQ alike.

  Args:
    choice: {path: name of a candidate}.
    candidates: {name: recipe}.
    model: what it is for. Layers that share a Param all get its candidate; layers without a choice stay in floats.

  Returns:
    [Rule], one a layer.
  """
  found = weight_sites(model)
  unknown = [path for path in choice if path not in found]
  if unknown:
    raise ValueError(f'The choice names {unknown}, and the model has {list(found)}. '
                     'Give the model that the costs were measured on.')
  chosen = {id(found[path].variable): candidates[name] for path, name in choice.items()}
  return [_rule(site, chosen[id(site.variable)]) for site in found.values() if id(site.variable) in chosen]


def _rule(site, candidate):
  """The first rule of a recipe that matches a site, for this site alone."""
  rule = next((r for r in candidate if r.matches(site)), rules.Rule(''))
  return dataclasses.replace(rule, path=re.escape(site.path), kind='.*')
