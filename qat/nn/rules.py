"""Recipes: which layer gets which quantizers."""

from collections.abc import Iterable
import dataclasses
import difflib
import re

from flax import nnx
import jax.numpy as jnp

from qat.nn import layouts, quantized, weights
from qat.quantizers import base

QUANTIZERS = ('weight', 'input', 'output', 'gradient', 'scores', 'cache')  # The fields of a Rule that may be set.


@dataclasses.dataclass(frozen=True)
class Rule:
  """Layers whose whole path matches `path`. Without quantizers, they stay in floats.

  Quantizers are prototypes: each operand of each layer gets one of its own.

  Attributes:
    path: a regular expression: 'blocks/\\d+/ffn/.*'. '.*' is everything that no rule before has.
    weight: of the layer's kernel or embedding, seen as matrices [in, out], or of the Param at `path`.
    input: of the first argument, where a product reads it.
    output: of what the layer returns.
    gradient: of what comes back through the layer's output.
    scores: of the queries, keys, values and probabilities of attention.
    cache: of its keys and values, as a cache holds them; `scores` is then of queries and probabilities alone.
    kind: a regular expression for the layer's class: 'Conv|ConvTranspose'.
  """
  path: str
  weight: base.Quantizer | None = None
  input: base.Quantizer | None = None
  output: base.Quantizer | None = None
  gradient: nnx.Module | None = None
  scores: base.Quantizer | None = None
  cache: base.Quantizer | None = None
  kind: str = '.*'

  def __post_init__(self):
    for field in ('path', 'kind'):
      try:
        re.compile(getattr(self, field))
      except (re.error, TypeError) as error:
        raise ValueError(f'Rule.{field} {getattr(self, field)!r} is no regular expression: {error}. '
                         "Write '.*' for anything.") from error
    for field in QUANTIZERS:
      value = getattr(self, field)
      if field != 'gradient' and value is not None and not isinstance(value, base.Quantizer):
        raise TypeError(f'Rule({self.path!r}).{field} is {value!r}, and no quantizer. Give an instance of one, such as '
                        'STE(spec), from qat.quantizers.')

  def matches(self, site):
    return bool(re.fullmatch(self.path, site.path) and re.fullmatch(self.kind, site.kind))


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """A place that a rule can name: a layer, a bare Param, or an attention function.

  Attributes:
    path: of the layer, or of the Param.
    module: what holds the weight.
    name: the weight's attribute; None for attention.
    kind: the layer's class, 'Param', or 'Attention'.
  """
  path: str
  module: nnx.Module
  name: str | None
  kind: str

  @property
  def layout(self):
    """Its weight's Layout."""
    quantizers = quantized.of(self.module)
    if quantizers is not None and self.name in vars(quantizers.weights):
      return vars(quantizers.weights)[self.name].layout
    layer = layouts.layer_type(self.module)
    if layer and layouts.LAYERS[layer][0] == self.name:
      return layouts.LAYERS[layer][1](self.module)
    return layouts.bare(self.variable)

  @property
  def lead(self):
    """The axes on which nnx.vmap or nnx.scan stacked the layer."""
    if self.name is None:  # As its projections.
      return next((s.lead for s in sites(self.module) if s.kind not in ('Param', 'Attention')), ())
    shape, layout = self.variable.get_value().shape, self.layout
    if isinstance(self.variable, weights.Codes):
      return tuple(shape[:len(shape) - 2 - len(layout.batch)])
    return tuple(shape[:len(shape) - len(layout.shape)])

  @property
  def variable(self):
    return vars(self.module)[self.name]


def sites(model):
  """Every place of `model` that a rule can name, in the order of definition."""
  found = []
  for path, module in quantized.walk(model):
    layer = layouts.layer_type(module)
    own = layouts.LAYERS[layer][0] if layer else None
    if own and isinstance(vars(module).get(own), nnx.Variable):
      found.append(Site(path, module, own, layer.__name__))
    if 'attention_fn' in vars(module):
      found.append(Site(f'{path}/attention_fn'.lstrip('/'), module, None, 'Attention'))
    if not layer and not isinstance(module, layouts.NORMS):
      found += [Site(f'{path}/{name}'.lstrip('/'), module, name, 'Param')
                for name, v in vars(module).items() if _is_matrix(v)]
  return found


def _is_matrix(value):
  """Whether an attribute is a Param of float matrices, or their codes."""
  if isinstance(value, weights.Codes):
    return True
  if not isinstance(value, nnx.Param) or isinstance(value, nnx.LoRAParam):  # Adapters stay in floats.
    return False
  array = value.get_value()
  return getattr(array, 'ndim', 0) >= 2 and jnp.issubdtype(array.dtype, jnp.floating)


def first_matches(recipe, found):
  """site -> its rule, or None; raises if a rule that names a path matches nothing."""
  if isinstance(recipe, (str, Rule)) or not isinstance(recipe, Iterable):
    raise TypeError(f'The recipe {recipe!r} is a {type(recipe).__name__}: a recipe is a list of Rules. '
                    "Write [qat.Rule(...)], or qat.recipes.get('w4a8').")
  recipe = tuple(recipe)
  if not recipe:
    raise ValueError("The recipe is empty: no layer would be quantized. Give at least Rule('.*', weight=...).")
  chosen = {site: next((r for r in recipe if r.matches(site)), None) for site in found}
  used = [r for r in recipe if any(r is rule for rule in chosen.values())]
  # A named recipe has rules for kinds of layers that a model may lack: one of them must take effect.
  served = lambda r: any(r is u or (r.path == u.path and r.kind != u.kind) for u in used)
  unused = [r.path for r in recipe if not served(r) and (r.path != '.*' or not used)]
  shadowed = [p for p in unused if any(re.fullmatch(p, s.path) for s in found)]
  paths = [s.path for s in found]
  if shadowed:
    raise ValueError(f'The rules {shadowed} take effect nowhere: rules before them match all their layers, or '
                     f'their `kind` matches none. The layers are {paths}. Put them earlier, or drop them.')
  if unused:
    near = difflib.get_close_matches(unused[0], paths, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ' A path is matched whole: write .*name.* for a part.'
    raise ValueError(f'No layer matches the rules {unused}. The layers are {paths}.{hint}')
  _check_caches(chosen)
  return chosen


def _check_caches(chosen):
  """Raises if rules put the cache of attention on a grid, and none of the sites that they match is attention."""
  asked = {s: r for s, r in chosen.items() if getattr(r, 'cache', None) is not None}
  if asked and not any(s.kind == 'Attention' for s in asked):
    rule = next(iter(asked.values()))
    raise ValueError(f'Rule({rule.path!r}).cache: it is for keys and values of attention, and the rule matches '
                     f'{[s.path for s in asked]} alone. Leave it out, or match an attention_fn.')
