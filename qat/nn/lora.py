"""LoRA and QLoRA: adapters beside any layer of a model, whose own weights stay as they are, floats or codes.

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022. https://arxiv.org/abs/2106.09685
Dettmers et al. QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023. https://arxiv.org/abs/2305.14314

    frozen = qat.freeze(qat.quantize(model, recipe))                     # QLoRA; without this line, LoRA
    model = qat.lora(frozen, ['blocks/.*'], rank=16, alpha=16)
    optimizer = nnx.Optimizer(model, tx, wrt=LoRAParam)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, LoRAParam))(model, batch)

The mathematics is in adapters.py, what layers do in adapted.py, where adapters start in lora_init.py, and how they end
in merge.py.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp

from qat.core import qarray
from qat.nn import adapted, adapters as adapters_, lora_init, quantized, rules as rules_, transform, weights

LoRAParam, Adapter = adapters_.LoRAParam, adapters_.Adapter


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Adapters for the layers whose whole path matches `path`, all of one kind.

  Attributes:
    path: a regular expression: 'blocks/\\d+/ffn/.*'. '.*' is everything that no rule before has.
    rank: r, of A B.
    alpha: what s comes from.
    scaling: (alpha, rank) -> s: adapters.by_rank, or by_root_of_rank for rsLoRA.
    dropout: of the input of A.
    init: where A and B start, a value of lora_init.py.
    dora: whether each output has a magnitude of its own, which trains (DoRA).
    group: inputs are summed over groups of this size first (QA-LoRA), so that A B merges into zeros of such groups.
    kind: a regular expression for the layer's class: 'Linear|Einsum'.
  """
  path: str
  rank: int
  alpha: float
  scaling: Callable = adapters_.by_rank
  dropout: float = 0.0
  init: Callable = lora_init.Random()
  dora: bool = False
  group: int = 1
  kind: str = '.*'

  def __post_init__(self):
    rules_.Rule(self.path, kind=self.kind)  # Or its error: no regular expression.
    count = (lambda v: isinstance(v, int) and v >= 1, 'a whole number of 1 or more')
    for field, (right, what) in dict(
        rank=count, group=count, alpha=(lambda v: _is_number(v) and 0 < v < float('inf'), 'a number above 0'),
        dropout=(lambda v: _is_number(v) and 0 <= v < 1, 'a probability, 0 <= p < 1'),
        scaling=(callable, 'a function (alpha, rank) -> s'),
        init=(callable, 'a value such as lora_init.LoftQ()')).items():
      value = getattr(self, field)
      if isinstance(value, bool) or not right(value):
        raise ValueError(f'LoRA({self.path!r}).{field} is {value!r}. Give {what}.')

  matches = rules_.Rule.matches


def _is_number(value):
  return isinstance(value, (int, float))


def lora(model, rules, rank=None, alpha=None, *, name='default', rngs=None, **settings):
  """A copy of `model` with an adapter at each layer that a rule gives one. It shares the arrays of `model`.

  Args:
    model: any nnx.Module: in floats, quantized, or frozen.
    rules: a list, of which the first that matches a layer decides: a LoRA; a regular expression for whole paths, which
      stands for LoRA(path, rank, alpha, **settings); or a qat.Rule(path), whose layers get none.
    rank, alpha, **settings: of the regular expressions.
    name: of the adapters. A layer may have several, and those of another name stay.
    rngs: where A comes from ('params') and what dropout draws from ('dropout'); nnx.Rngs(0) if not given.

  Returns:
    A model of the same class. Layers that share a weight share its adapter. Layers without an adapter decode their
    codes again in the backward pass from now on, if they have any, as those with one do.
  """
  rngs = nnx.Rngs(0) if rngs is None else rngs
  _check_name(name)
  recipe = _recipe(rules, rank, alpha, settings)
  model = nnx.clone(model)
  found = [s for s in rules_.sites(model) if s.name is not None]
  _check_not_adapters(model, recipe, found)
  chosen = {s.path: r for s, r in rules_.first_matches(recipe, found).items() if isinstance(r, LoRA)}
  if not chosen:
    raise ValueError(f'The rules {[r.path for r in recipe]} give no layer an adapter: none that matches is a LoRA.')
  shared, codes = {}, {}
  for site in found:
    if site.path in chosen:
      _adapt(site, chosen[site.path], name, rngs, shared, codes)
  transform.hold(model, codes)
  for site in found:
    q = quantized.of(site.module)
    if q is not None and site.name in q.weights and adapted.has_own_product(type(site.module)):
      adapted.attach(site.module, site.name, site.path)
  return model


def _recipe(rules, rank, alpha, settings):
  """Rules, each a LoRA or a qat.Rule."""
  if isinstance(rules, (str, LoRA, rules_.Rule)) or not hasattr(rules, '__iter__'):
    raise TypeError(f"The rules {rules!r} are a {type(rules).__name__}: write a list, such as ['blocks/.*'].")
  recipe = []
  for rule in rules:
    if isinstance(rule, str):
      rule = LoRA(rule, rank, alpha, **settings)
    elif not isinstance(rule, (LoRA, rules_.Rule)):
      raise TypeError(f"The rule {rule!r} is a {type(rule).__name__}. Write a regular expression such as 'blocks/.*', "
                      'or LoRA(path, rank, alpha).')
    elif any(getattr(rule, field, None) is not None for field in rules_.QUANTIZERS):
      raise TypeError(f'qat.Rule({rule.path!r}) has quantizers, and qat.lora only adds adapters. Call qat.quantize '
                      'first.')
    recipe.append(rule)
  if not recipe:
    raise ValueError("There are no rules: no layer would get an adapter. Write ['.*'] for all.")
  return recipe


def _check_name(name):
  if not isinstance(name, str) or not name.isidentifier() or name.startswith('_'):
    raise ValueError(f'The adapter is named {name!r}: a name is part of the paths of its arrays. Use letters, digits '
                     'and _, with a letter first.')


def _check_not_adapters(model, recipe, found):
  """Raises if a rule is for the arrays of an adapter."""
  own = [p for path, m in quantized.walk(model) if isinstance(m, Adapter) for p in (path, f'{path}/A', f'{path}/B')]
  for rule in recipe:
    hits = [p for p in own if re.fullmatch(rule.path, p)]
    if hits and not any(rule.matches(site) for site in found):
      raise ValueError(f'The rule {rule.path!r} names {hits[0]!r}, which is an adapter: there are none for adapters. '
                       'Name the layer, and give another `name` for a second adapter beside the first.')


def _adapt(site, rule, name, rngs, shared, codes):
  """Puts an adapter at one site, in place; what takes the weight's place goes to `codes` if it is codes."""
  held = adapted.of(site.module, site.name)
  if held is not None and name in held:
    raise ValueError(f"Layer '{site.path}' has an adapter '{name}' already. Give another `name`, or call "
                     f"lora.remove(model, '{name}') first.")
  if rule.dropout and not adapted.has_own_product(type(site.module)):
    raise ValueError(f"Layer '{site.path}', a {type(site.module).__name__}, reads W + s A B, and never multiplies its "
                     f'input by A: there is nothing for a dropout of {rule.dropout} to drop. Give it dropout=0.')
  key = id(site.variable)
  if key not in shared:
    try:
      shared[key] = site, _adapter(site, rule, rngs, codes)
    except ValueError as e:
      raise ValueError(f"Layer '{site.path}': {e}") from e
  first, adapter = shared[key]
  if first.layout != site.layout:
    raise ValueError(f"Layers '{first.path}' and '{site.path}' share a weight whose inputs are the axes "
                     f'{first.layout.inputs} of one and {site.layout.inputs} of the other: no A B serves both. '
                     'Let a rule match one of them only.')
  adapted.attach(site.module, site.name, site.path)[name] = adapter
  _check_active(site.path, site.module, site.name)


def _adapter(site, rule, rngs, codes):
  """The Adapter of a site. Its weight may change: floats in place, codes by way of `codes`."""
  inputs, outputs = _fan(site, rule)
  value, frozen = site.variable.get_value(), isinstance(site.variable, weights.Codes)
  w = None if frozen else site.layout.to_matrix(value).astype(jnp.float32)
  lead = (value if frozen else w).shape[:-2]
  scaling = rule.scaling(rule.alpha, rule.rank)
  key = rngs.params()
  base = lora_init.Base(inputs, outputs, None, _grid(site), scaling)
  new, A, B = _start(jax.random.split(key, lead) if lead else key, w, base, rule.init, rule.rank)
  adapter = Adapter(A, B, rule.alpha, scaling, rule.group)
  if isinstance(new, qarray.QArray):
    codes[site.path] = new
  elif new is not None:
    site.variable.set_value(site.layout.from_matrix(new).astype(value.dtype))
  if rule.dropout:
    adapter.dropout = _dropout(rule.dropout, rngs, site.lead)
  if rule.dora:
    matrices = weights.decode(codes[site.path], jnp.float32) if site.path in codes else _read(site)
    adapter.magnitude = LoRAParam(adapters_.norms(adapters_.moved(matrices, [adapter])))
  return adapter


def _fan(site, rule):
  """(inputs of A, outputs of B); raises where they do not fit the rule."""
  form = site.layout
  inputs, outputs = (math.prod(form.shape[a] for a in axes) for axes in (form.inputs, form.outputs))
  if inputs % rule.group:
    raise ValueError(f'it has {inputs} inputs, which groups of {rule.group} do not tile. Pick a divisor as the group.')
  inputs //= rule.group
  if rule.rank > min(inputs, outputs):
    raise ValueError(f'it has {inputs} inputs{" after pooling" * (rule.group > 1)} and {outputs} outputs, and was '
                     f'given rank {rule.rank}. A B has at most rank {min(inputs, outputs)}: give a smaller one.')
  return inputs, outputs


def _grid(site):
  """The Grid of a site's weight quantizer, or None if it has none that refits its range to any matrix."""
  q = quantized.of(site.module)
  weight = q and vars(q.weights).get(site.name)
  rule = weight and getattr(weight.quantizer, 'rule', None)
  return rule and lora_init.Grid(weight.quantizer.spec, rule)


def _read(site):
  """What the layer multiplies by, before it has this adapter: f32[*lead, in, out]."""
  layer = adapted.base(site.module) if adapted.of(site.module, site.name) is not None else site.module
  return site.layout.to_matrix(getattr(layer, site.name)[...]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _start(keys, w, base, init, rank):
  """init(key, base, rank) for each matrix [*lead, in, out]."""
  one = lambda key, w: init(key, dataclasses.replace(base, w=w), rank)
  for _ in range(keys.ndim):
    one = jax.vmap(one)
  return one(keys, w)


def _dropout(rate, rngs, lead):
  """An nnx.Dropout with keys of its own for each layer of a stack."""
  dropout = nnx.Dropout(rate)
  key = rngs.dropout()
  dropout.rngs = nnx.RngStream(jax.random.split(key, lead) if lead else key, tag='dropout')
  return dropout


def _check_active(path, layer, weight):
  used = adapted.active(layer, weight)
  if len(used) > 1 and any(a.magnitude is not None for a in used):
    raise ValueError(f"Layer '{path}' would use {len(used)} adapters at once, one of them with magnitudes (DoRA), "
                     'which say what the length of all is. Activate it alone: lora.activate(model, name).')


def sites(model):
  """The Sites of `model` that have adapters, each weight once for each layer that reads it."""
  return [s for s in rules_.sites(model) if s.name is not None and adapted.of(s.module, s.name)]


def adapters(model):
  """path of the layer or Param -> {name: Adapter}. Layers that share a weight have the same Adapter."""
  return {s.path: dict(adapted.of(s.module, s.name).items()) for s in sites(model)}


def names(model):
  """The names of the adapters of `model`, sorted."""
  return sorted({name for held in adapters(model).values() for name in held})


def activate(model, *chosen):
  """A copy of `model` that uses the adapters of these names only, and sums them; of no name, none: the base model."""
  _check_known(model, chosen)
  model = nnx.clone(model)
  for site in sites(model):
    for name, adapter in adapted.of(site.module, site.name).items():
      adapter.active = name in chosen
    _check_active(site.path, site.module, site.name)
  return model


def remove(model, *chosen):
  """A copy of `model` without the adapters of these names."""
  _check_known(model, chosen)
  model = nnx.clone(model)
  for site in sites(model):
    held = adapted.of(site.module, site.name)
    for name in set(chosen) & set(held):
      del held[name]
  return model


def _check_known(model, chosen):
  if unknown := sorted(set(chosen) - set(names(model))):
    raise ValueError(f'The model has no adapter {unknown}. It has {names(model)}.')


def labels(params):
  """'A', 'B' or 'magnitude' for each adapter variable: groups for optax.multi_transform.

  Hayou et al. LoRA+: Efficient Low Rank Adaptation of Large Models, ICML 2024. https://arxiv.org/abs/2402.12354
  learns B at a higher rate than A, 16 times in its experiments:

      tx = optax.multi_transform({'A': adam(rate), 'B': adam(16 * rate), 'magnitude': adam(rate)}, lora.labels)
      optimizer = nnx.Optimizer(model, tx, wrt=LoRAParam)

  Args:
    params: any tree in whose paths A, B and magnitude are keys, such as nnx.state(model, LoRAParam).
  """
  def label(path, leaf):
    del leaf
    keys = [k for k in map(_key, path) if k in ('A', 'B', 'magnitude')]
    if not keys:
      raise ValueError(f'{jax.tree_util.keystr(path)} is no array of an adapter: its path has no A, B or magnitude. '
                       'Give nnx.state(model, LoRAParam).')
    return keys[-1]

  return jax.tree_util.tree_map_with_path(label, params)


def _key(entry):
  return getattr(entry, 'key', getattr(entry, 'name', None))
