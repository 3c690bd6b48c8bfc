"""Re-rounding: adapters merged into floats, and these put back on the grid of their base by a solver.

Rounding W + s A B to nearest gives away what the adapters learned below half a step of the grid. A solver that measures
errors on the outputs of the adapted layers (GPTQ and its kin) keeps most of it.
"""

import re

from qat.core import ranges
from qat.nn import adapted, lora, merge, rules, transform, weights
from qat.ptq import walk as walk_
from qat.quantizers.ste import STE


def reround(model, batches, method, rule=ranges.absmax, **walk):
  """The frozen model that a method makes of an adapted one, whose adapters are in its codes.

  Args:
    model: of `qat.lora`. Its bases with an active adapter are frozen; layers without one stay as they are.
    batches: what `apply` takes, a list: the inputs on which errors are measured.
    method: such as methods.Layerwise(solvers.GPTQ()) or named.named('gptq'). Solvers have range rules of their own.
    rule: of the scales where the method rounds to nearest: ranges.centered for specs.NF4_DQ, for instance.
    **walk: `apply`, `store` and `watch` of walk.walk.

  Returns:
    A frozen model without adapters, on the Specs of the bases, and the coverage report of walk.walk.
  """
  grids = _grids(model)
  floats = merge.merge(model)
  recipe = [rules.Rule(re.escape(path), weight=STE(spec, rule)) for path, spec in grids.items()]
  return walk_.walk(transform.quantize(floats, recipe), floats, batches, method, **walk)


def _grids(model):
  """{path: Spec} of the weights that active adapters change."""
  grids = {}
  for site in lora.sites(model):
    if not adapted.active(site.module, site.name):
      continue
    if not isinstance(site.variable, weights.Codes):
      raise ValueError(f"Layer '{site.path}' has its adapters on floats, which are on no grid. Call qat.nn.merge.merge "
                       'on the model, and qat.quantize on what it returns.')
    grids[site.path] = site.variable.get_value().spec
  if not grids:
    raise ValueError(f'No adapter is active: there is nothing to merge. The model has adapters {lora.names(model)}. '
                     'Call lora.activate(model, name) first.')
  return grids
