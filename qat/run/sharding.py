r"""Which axis of the mesh splits which axis of each array: regular expressions over paths, the first match wins.

    sharding = (
        (r'blocks/\d+/ffn/(gate|up)/kernel', ('fsdp', 'model')),
        (r'blocks/\d+/ffn/down/kernel', ('model', 'fsdp')))

A rule names an axis of the mesh, several, or None for each of the trailing axes of a parameter, as a Spec's block does:
so the same rule serves a layer and a stack of them. What no rule matches is whole on every device.

What is kept of a weight follows it: its codes with their scales and zeros, what its quantizer learns, its adapters, and
the moments of the optimizer. An axis of scales that is as long as that of the weight, or a group's share of it, is
split alike where the mesh divides it, and is whole otherwise.

Xu et al. GSPMD: General and Scalable Parallelization for ML Computation Graphs, 2021. https://arxiv.org/abs/2105.04663
Shoeybi et al. Megatron-LM, 2019, Sec. 3: by columns, then by rows. https://arxiv.org/abs/1909.08053
Rajbhandari et al. ZeRO, SC 2020: what `fsdp` does is its third stage. https://arxiv.org/abs/1910.02054
"""

import dataclasses
import math
import re

from flax import nnx
import jax

from qat.core import qarray
from qat.nn import rules
from qat.run import names

# Of the networks of qat/models. Here an axis that the mesh does not divide stays whole, and a rule may match nothing.
DEFAULT = (
    (r'(.*/)?(attention/o|ffn/down|layers/\d*[13579])/kernel', ('model', 'fsdp')),   # By rows: Megatron's second.
    (r'(.*/)?kernel', ('fsdp', 'model')),                                            # By columns, convolutions too.
    (r'(.*/)?embed/embedding', ('model', 'fsdp')),                                   # Words x features.
    (r'(.*/)?embedding', (None, 'fsdp')),
    (r'(.*/)?(attention/[qkv]|ffn/(gate|up)|layers/\d*[02468])/bias', ('model',)))
# What blocks return, [b, t, width]: axes from the left, and what is left is the compiler's choice.
ACTIVATIONS = ((r'(.*/)?blocks/\d+', (('data', 'fsdp'), 'sequence')),)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A row of the table.

  Attributes:
    regex: for whole paths.
    axes: for each axis of the array, the names of axes of the mesh, a tuple.
    strict: whether an axis that the mesh does not divide is an error.
  """
  regex: str
  axes: tuple
  strict: bool = True

  def __str__(self):
    return f'{self.regex!r}, {tuple(a if len(a) > 1 else a[0] if a else None for a in self.axes)}'


def table(config, leaf, sizes, default):
  """[Rule] of a leaf of the config, or those of `default` if it is empty.

  Args:
    config, leaf: `config[leaf]` is a tuple of (regex, axes).
    sizes: {axis of the mesh: devices along it}.
    default: likewise.
  """
  given = config.get(leaf, ())
  try:
    pairs = [(regex, entries) for regex, entries in given or default]
  except (TypeError, ValueError) as error:
    raise ValueError(f'--config.{leaf}={given!r}: it is a tuple of pairs, a regular expression for paths and the axes '
                     f"of the mesh. Write it as (('head/kernel', ('fsdp', 'model')),).") from error
  return [_rule(leaf, regex, entries, sizes, bool(given)) for regex, entries in pairs]


def _rule(leaf, regex, entries, sizes, strict):
  """One Rule, checked against the axes of the mesh."""
  where = f'{leaf} rule ({regex!r}, {entries!r})'
  try:
    re.compile(regex)
  except (re.error, TypeError) as error:
    raise ValueError(f"{where}: {error}; it is no regular expression. Write '.*' for anything.") from error
  if not isinstance(entries, (tuple, list)):
    raise ValueError(f'{where}: its axes are no tuple. Write one entry for each axis of the array: '
                     f"({entries!r},), or (None, 'model').")
  axes = tuple(tuple(e) if isinstance(e, (tuple, list)) else (() if e is None else (e,)) for e in entries)
  named = [a for entry in axes for a in entry]
  for a in named:
    if a not in sizes:
      raise ValueError(f'{where}: the mesh has no axis {a!r}. {names.suggest(a, sizes)}')
    if named.count(a) > 1:
      raise ValueError(f'{where}: it names the axis {a!r} twice, and an axis of the mesh splits one axis of an array. '
                       'Name it once.')
  return Rule(regex, axes, strict)


def first_matches(found, there, leaf, what):
  """{path: its Rule or None}; raises at a rule that takes effect nowhere.

  Args:
    found: [Rule].
    there: paths.
    leaf, what: of the config, and what paths are of, for the message.
  """
  chosen = {path: next((r for r in found if re.fullmatch(r.regex, path)), None) for path in there}
  used = set(map(id, chosen.values()))
  if unused := [r.regex for r in found if r.strict and id(r) not in used]:
    raise ValueError(f'No {what} is left for the {leaf} rules {unused}: none matches, or rules before them have all '
                     f'of theirs. The {what}s are {sorted(there)}. Correct the regex (it must match the whole path), '
                     'put it earlier, or drop it.')
  return chosen


def placed(model, found, sizes):
  """{path of an array: for each of its axes, the axes of the mesh that split it}; those not there are whole.

  Args:
    model: any nnx.Module, quantized, frozen or adapted.
    found: [Rule].
    sizes: {axis of the mesh: devices along it}.
  """
  variables = _variables(model)
  own = {path: v for path, v in variables.items() if not re.search(r'(^|/)(quantizers|adapters)/', path)}
  layouts = {site.path if site.kind == 'Param' else f'{site.path}/{site.name}'.lstrip('/'): site.layout
             for site in rules.sites(model) if site.name is not None}
  result = {}
  for path, rule in first_matches(found, own, 'sharding', 'parameter').items():
    if rule is None:
      continue
    value, layout = own[path].get_value(), layouts.get(path)
    shape = _float_shape(value, layout)
    split = _checked(rule, path, shape, sizes)
    if isinstance(value, qarray.QArray):
      result |= _arrays(path, value, *_matrix(split, shape, layout), sizes)
    else:
      result[path] = split
    if layout is not None:
      result |= _followers(path, variables, *_matrix(split, shape, layout), sizes)
  return result


def _variables(model):
  """{path: nnx.Variable} of a model, random keys left out."""
  flat = nnx.to_flat_state(nnx.state(model))
  found = {'/'.join(map(str, path)): v for path, v in zip(flat.paths, flat.leaves)}
  return {path: v for path, v in found.items() if not issubclass(v.type, nnx.RngState)}


def _float_shape(value, layout):
  """The shape of the Param that an array is, or that its codes stand for."""
  if not isinstance(value, qarray.QArray):
    return tuple(value.shape)
  return (*value.shape[:value.ndim - 2 - len(layout.batch)], *layout.shape)


def _checked(rule, path, shape, sizes):
  """The axes of the mesh for each axis of a parameter."""
  if len(rule.axes) > len(shape):
    if rule.strict:
      raise ValueError(f'sharding rule ({rule}): it has {len(rule.axes)} entries, and {path!r} has shape '
                       f'{tuple(shape)}. Give one entry for each axis, or for the last ones.')
    return ((),) * len(shape)
  split = ((),) * (len(shape) - len(rule.axes)) + rule.axes
  for i, (n, entry) in enumerate(zip(shape, split)):
    if rule.strict and n % _count(entry, sizes):
      product = ' * '.join(f'mesh.{a}={sizes[a]}' for a in entry)
      raise ValueError(f'sharding rule ({rule}): axis {i} of {path!r} has {n} elements, not a multiple of {product}. '
                       'Leave that axis whole (None), choose another mesh, or pad the parameter.')
  return fitted(split, shape, sizes)


def fitted(split, shape, sizes):
  """`split` without the entries that do not divide their axis."""
  return tuple(entry if n % _count(entry, sizes) == 0 else () for entry, n in zip(split, shape))


def _count(entry, sizes):
  return math.prod(sizes[a] for a in entry)


def _matrix(split, shape, layout):
  """(axes of the mesh, sizes) of a parameter seen as [*lead, in, out]."""
  lead = len(shape) - len(layout.shape)
  kept = (*range(lead), *(lead + a for a in layout.batch))
  sides = layout.inputs, layout.outputs
  axes = *(split[a] for a in kept), *(tuple(n for a in side for n in split[lead + a]) for side in sides)
  return axes, (*(shape[a] for a in kept), *(math.prod(shape[lead + a] for a in side) for side in sides))


def follow(split, shape, other, sizes):
  """How an array of shape `other` is split whose trailing axes are those of one of `shape`, or groups of them.

  >>> follow((('fsdp',), ('model',)), (128, 64), (2, 64), dict(fsdp=2, model=2))
  (('fsdp',), ('model',))
  >>> follow((('fsdp',), ('model',)), (128, 64), (1, 64), dict(fsdp=2, model=2))
  ((), ('model',))
  """
  kept = min(len(shape), len(other))
  trailing = zip(split[len(split) - kept:], shape[len(shape) - kept:], other[len(other) - kept:])
  alike = tuple(entry if m > 1 and n % m == 0 else () for entry, n, m in trailing)
  return fitted(((),) * (len(other) - kept) + alike, other, sizes)


def _arrays(path, value, split, shape, sizes):
  """{path of each array of a value, which may be a QArray: how it is split}."""
  leaves = jax.tree_util.tree_flatten_with_path(value)[0]
  name = lambda keys: '/'.join([path, *(str(k.name) for k in keys)])
  return {name(keys): follow(split, shape, x.shape, sizes) for keys, x in leaves}


def _followers(path, variables, split, shape, sizes):
  """The same for what the quantizer and the adapters of a weight keep."""
  layer, _, name = path.rpartition('/')
  start = lambda kind: f'{layer}/{kind}/{name}/'.lstrip('/')
  result = {}
  for other, v in variables.items():
    value, last = v.get_value(), other.rpartition('/')[2]
    if other.startswith(start('quantizers/weights')):
      result |= _arrays(other, value, split, shape, sizes)
    elif other.startswith(start('adapters')):
      if last == 'magnitude':
        result |= _arrays(other, value, (*split[:-2], split[-1]), (*shape[:-2], shape[-1]), sizes)
      else:                                                              # The rank is whole: A[in, r], B[r, out].
        own = (*split[:-1], ()) if last == 'A' else (*split[:-2], (), split[-1])
        result |= _arrays(other, value, own, shape, sizes)
  return result
