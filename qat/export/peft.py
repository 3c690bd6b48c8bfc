"""Adapters on disk as Hugging Face's PEFT keeps them: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint

    peft.save(model, 'my_adapter', families.FAMILIES['llama'], base='HuggingFaceTB/SmolLM2-135M-Instruct')
    model = peft.load(base_model, 'my_adapter', families.FAMILIES['llama'])

    head = peft.Head('head', 'classifier', body='encoder', scale=20.0)   # Of a classifier of texts.
    peft.save(classifier, 'my_adapter', families.FAMILIES['bert'], head=head)

Layers are called by the family's names. Matrices are stored [r, in] and [out, r], those of an embedding [r, words] and
[features, r]. Models out of GGUF files turn neighbours by their positions, and Hugging Face's the halves of a head:
outputs of their queries and keys are reordered on the way out and in.

A head is saved whole, as PEFT saves a classifier's (task_type SEQ_CLS, modules_to_save). What a head reads is not in
the files: a classifier of qat/run/classification.py gives it the embedding of the text, the mean over its tokens of
length 1, and transformers' BertForSequenceClassification the first token's vector through a tanh. An adapter of the one
is none of the other.

What PEFT has no place for is refused: adapters of layers stacked by scan, QA-LoRA's groups, and GPT-2's queries, keys
and values, which are one layer there.
"""

import dataclasses
import json
import pathlib
import re

from flax import nnx
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qat.export import files
from qat.models import rope
from qat.models.pretrained import names
from qat.nn import adapters, lora, quantized, rules

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
ROOT = 'base_model.model.'
MAGNITUDE = 'lora_magnitude_vector'
TASK = 'SEQ_CLS'
CLASSIFIERS = {'classifier', 'score'}  # PEFT names both for this task, whichever of them the model has.
# What changes the function that an adapter computes, and is not read.
UNREAD = ('layer_replication', 'lora_bias', 'trainable_token_indices', 'use_qalora',
          'target_parameters', 'alora_invocation_tokens', 'fan_in_fan_out')


@dataclasses.dataclass(frozen=True)
class Head:
  """The layer of a classifier that trains in full and is saved whole, and where the network is that it stands on.

  Attributes:
    path: of the head, an nnx.Linear in floats.
    theirs: its name in Hugging Face's model: 'classifier' in encoders, 'score' in decoders.
    body: path of the network whose layers the family names; '' for the model itself.
    scale: what the head's inputs are multiplied by before they come to it. There they are not: it is stored in the
      weight.
  """
  path: str
  theirs: str = 'classifier'
  body: str = ''
  scale: float = 1.0

  def layer(self, model):
    """The nnx.Linear of a model."""
    found = dict(quantized.walk(model)).get(self.path)
    if not isinstance(found, nnx.Linear) or not isinstance(vars(found)['kernel'], nnx.Param):
      raise ValueError(f"Head.path '{self.path}' is a {type(found).__name__} in a {type(model).__name__}: a head is an "
                       'nnx.Linear in floats. Name one.')
    return found


def save(model, folder, family, name='default', base='', overwrite=False, head=None):
  """Writes the adapter `name` of a model.

  Args:
    model: what qat.lora returned.
    folder: is made if it is not there.
    family: family.Family, by whose names layers are called.
    name: of the adapter.
    base: the name or path of the base model, which PEFT reads. LoftQ and PiSSA change the base: save that as well.
    overwrite: whether an adapter that is there may be written over.
    head: of a classifier, a Head.
  """
  folder = pathlib.Path(folder)
  if not overwrite and (there := [f for f in (CONFIG, WEIGHTS) if (folder / f).exists()]):
    raise ValueError(f'{folder} holds {there} already. Name another folder, or give overwrite=True.')
  chosen = {path: held[name] for path, held in lora.adapters(model).items() if name in held}
  if not chosen:
    raise ValueError(f'The model has no adapter {name!r}: it has {lora.names(model)}.')
  modules = _modules(model, family, head)
  if lost := sorted(set(chosen) - {site.path for site in modules.values()}):
    raise ValueError(f'The adapters of {lost[:4]} have no layer of their own under the names of the family, so that '
                     'PEFT has no place for them. Merge them: qat.nn.merge.merge(model).')
  found = {theirs: chosen[site.path] for theirs, site in modules.items() if site.path in chosen}
  tensors = {f'{ROOT}{theirs}.{part}': x for theirs, adapter in found.items()
             for part, x in _parts(adapter, modules[theirs], _outputs(model, modules[theirs])).items()}
  config = _config(found, modules, base)
  if head is not None:
    tensors |= {f'{ROOT}{head.theirs}.{part}': x for part, x in _head_parts(head, model).items()}
    config |= dict(task_type=TASK, modules_to_save=[head.theirs])
  folder.mkdir(parents=True, exist_ok=True)
  files.write(folder / WEIGHTS, safetensors.numpy.save(tensors, {'format': 'pt'}))
  files.write(folder / CONFIG, (json.dumps(config, indent=2) + '\n').encode())


def load(model, folder, family, name='default', head=None):
  """A copy of a model with the adapter in a folder that PEFT or `save` wrote.

  Args:
    model: in floats, or frozen; what the adapter was trained beside.
    folder: of the two files.
    family: family.Family, by whose names layers are called.
    name: of the adapter in the copy.
    head: of a classifier, a Head: what the folder must hold as well.
  """
  folder = pathlib.Path(folder)
  config, tensors = _read(folder)
  tensors, whole = _apart(config, tensors, head, folder)
  modules = _modules(model, family, head)
  found = _by_module(tensors, modules, family, folder)
  recipe = [_rule(config, theirs, modules[theirs], parts) for theirs, parts in found.items()]
  model = lora.lora(model, [*recipe, rules.Rule('.*')], name=name)
  there = lora.adapters(model)
  for theirs, parts in found.items():
    site = modules[theirs]
    _fill(there[site.path][name], parts, site, _outputs(model, site), f'{folder / WEIGHTS}: {theirs}')
  if head is not None:
    _fill_head(head, model, whole, f'{folder / WEIGHTS}: {head.theirs}')
  return model


def _head_parts(head, model):
  """{'weight': f32[out, in], 'bias': f32[out]} of a head."""
  layer = head.layer(model)
  parts = dict(weight=np.ascontiguousarray(head.scale * np.asarray(layer.kernel.get_value(), np.float32).T))
  return parts if layer.bias is None else parts | dict(bias=np.asarray(layer.bias.get_value(), np.float32))


def _apart(config, tensors, head, folder):
  """({name: array} of the adapters, {part: array} of the head)."""
  saved = set(config.get('modules_to_save') or ())
  where = f'{folder / CONFIG}: it has modules_to_save {sorted(saved)}'
  if head is None:
    if saved:
      raise ValueError(f'{where}, of task_type {config.get("task_type")!r}, which go with the adapter. Give the head '
                       "that takes them, such as peft.Head('head', 'classifier').")
    return tensors, {}
  if head.theirs not in saved or saved - CLASSIFIERS - {head.theirs}:
    raise ValueError(f'{where}, and {head.theirs!r} alone was asked for. Give the Head that names what is there.')
  whole = {key: match[1] for key in tensors
           if (match := re.fullmatch(rf'(?:{re.escape(ROOT)})?{re.escape(head.theirs)}\.(\w+)', key))}
  return {key: x for key, x in tensors.items() if key not in whole}, {part: tensors[k] for k, part in whole.items()}


def _fill_head(head, model, parts, where):
  """Puts the arrays of the file into a head."""
  layer = head.layer(model)
  change = dict(weight=lambda x: x.T / np.float32(head.scale), bias=lambda x: x)
  wanted = {part: v for part, v in (('weight', layer.kernel), ('bias', layer.bias)) if v is not None}
  if set(parts) != set(wanted):
    raise ValueError(f'{where}: it has {sorted(parts)}, and the head takes {sorted(wanted)}. The adapter is not whole, '
                     'or of another classifier.')
  for part, variable in wanted.items():
    x = change[part](np.asarray(parts[part], np.float32))
    if x.shape != variable.get_value().shape:
      raise ValueError(f'{where}: {part} has shape {parts[part].shape}, which becomes {x.shape}, and the head takes '
                       f'{variable.get_value().shape}: it is of other classes or of another width. Give the head as '
                       'many outputs as there are classes.')
    variable.set_value(jnp.asarray(x, variable.get_value().dtype))


def _modules(model, family, head=None):
  """{layer's name in Hugging Face's model: Site}, for the layers that are one there as well."""
  found, prefix = {}, f'{head.body}/' if head and head.body else ''
  sites = [s for s in rules.sites(model) if s.path.startswith(prefix) and not (head and s.path == head.path)]
  for site in sites:
    if site.kind in ('Linear', 'Embed') and not site.lead:
      row, theirs = names.find(family.table, f'{site.path.removeprefix(prefix)}/{site.name}')
      if row.change in (names.transposed, names.unchanged):
        outside = theirs.startswith('lm_head')                           # Of the model proper.
        found[('' if outside else family.prefix) + theirs.removesuffix('.weight')] = site
  return found


def _outputs(model, site):
  """Which of the layer's outputs is each of theirs: i32[out], or None where the order is the same."""
  config = getattr(model, 'config', None)
  turned = site.path.rpartition('/')[2] in ('q', 'k') and getattr(config, 'rope', None) is not None
  if not turned or config.rope.turn is not rope.interleaved:
    return None
  heads = np.arange(site.variable.get_value().shape[-1]).reshape(-1, config.head_dim // 2, 2)
  return np.moveaxis(heads, -1, 1).ravel()                               # Pairs (2i, 2i + 1) -> (i, i + d/2).


def _parts(adapter, site, outputs):
  """{what follows the layer's name: f32 array} of an Adapter."""
  if adapter.group > 1:
    raise ValueError(f"The adapter of '{site.path}' sums inputs over groups of {adapter.group} (QA-LoRA). Merge it: "
                     'qat.nn.merge.merge_pooled(model).')
  A, B = (np.asarray(p.get_value(), np.float32) for p in (adapter.A, adapter.B))
  if site.kind == 'Embed':
    if adapter.magnitude is not None:
      raise ValueError(f"The adapter of '{site.path}' has a magnitude a word, and PEFT's a magnitude a feature "
                       "(DoRA). Merge it.")
    return dict(lora_embedding_A=B, lora_embedding_B=A)
  reorder = lambda x: np.ascontiguousarray(x if outputs is None else x[..., outputs])
  parts = {'lora_A.weight': np.ascontiguousarray(A.T), 'lora_B.weight': np.ascontiguousarray(reorder(B).T)}
  if adapter.magnitude is not None:
    parts[MAGNITUDE] = reorder(np.asarray(adapter.magnitude.get_value()))
  return parts


def _config(found, modules, base):
  """adapter_config.json: the first layer's settings, and patterns for those that differ."""
  first = next(iter(found.values()))
  kinds = {_is_rs(theirs, a) for theirs, a in found.items()}
  same = lambda what, values: len(set(values)) == 1 or _refuse(what, values)
  same('scalings', kinds)
  same('kinds, with and without magnitudes,', [a.magnitude is not None for a in found.values()])
  rates = [0.0 if a.dropout is None else a.dropout.rate for a in found.values()]
  same('dropouts', rates)
  different = lambda of: {theirs: of(a) for theirs, a in found.items() if of(a) != of(first)}
  return dict(
      peft_type='LORA', task_type=None, base_model_name_or_path=base, inference_mode=True, bias='none',
      r=first.rank, lora_alpha=first.alpha, lora_dropout=rates[0], target_modules=_targets(found, modules),
      rank_pattern=different(lambda a: a.rank), alpha_pattern=different(lambda a: a.alpha),
      use_rslora=kinds.pop(), use_dora=first.magnitude is not None, fan_in_fan_out=False, init_lora_weights=True,
      modules_to_save=None, layers_to_transform=None, layers_pattern=None)


def _is_rs(theirs, adapter):
  """Whether s is alpha / sqrt(r), and not alpha / r."""
  for scaling, rs in ((adapters.by_rank, False), (adapters.by_root_of_rank, True)):
    if np.isclose(adapter.scaling, scaling(adapter.alpha, adapter.rank), rtol=1e-6):
      return rs
  raise ValueError(f'The adapter of {theirs!r} is scaled by {adapter.scaling}, which is neither alpha / r nor alpha / '
                   'sqrt(r): PEFT knows these two. Merge it, or put the difference into B.')


def _refuse(what, values):
  raise ValueError(f'The adapters have different {what} {sorted(set(values))}, and PEFT has one for all. Give each '
                   'kind a name of its own, and save it under that.')


def _targets(found, modules):
  """Last parts of the layers' names, where these name no other layer; else whole names."""
  last = lambda theirs: theirs.rpartition('.')[2]
  short = {last(theirs) for theirs in found}
  return sorted(short if {m for m in modules if last(m) in short} == set(found) else found)


def _read(folder):
  """(adapter_config.json, {name: array}) of a folder."""
  try:
    config = json.loads((folder / CONFIG).read_text())
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  except FileNotFoundError as error:
    raise ValueError(f'{folder}: an adapter is {CONFIG} and {WEIGHTS}, and {error.filename or WEIGHTS} is not there. '
                     'Name the folder that holds both.') from error
  except (json.JSONDecodeError, safetensors.SafetensorError) as error:
    raise ValueError(f'{folder}: a file is not whole ({error}). Get the adapter anew.') from error
  if config.get('peft_type') != 'LORA':
    raise ValueError(f'{folder / CONFIG}: its peft_type is {config.get("peft_type")!r}. Only LORA is read.')
  asked = [key for key in UNREAD if config.get(key)] + ['bias'] * (config.get('bias', 'none') != 'none')
  if asked:
    raise ValueError(f'{folder / CONFIG}: it asks for {asked}, which are not read, and without them the adapter would '
                     'compute something else. Take one without, or merge it in PEFT.')
  return config, tensors


def _by_module(tensors, modules, family, folder):
  """{layer's name: {part: array}}; every tensor must belong to a layer of the model."""
  bare = {theirs.removeprefix(family.prefix): theirs for theirs in modules}
  found, unknown = {}, []
  for key, x in tensors.items():
    match = re.fullmatch(rf'(?:{re.escape(ROOT)})?(.+?)\.(lora_\w+|base_layer)(?:\.weight)?', key)
    theirs = match and bare.get(match[1].removeprefix(family.prefix))
    if theirs is None:
      unknown.append(key)
    elif match[2] == 'base_layer':                                       # PEFT keeps embeddings that have adapters.
      _check_same(modules[theirs], x, f'{folder / WEIGHTS}: {key}')
    else:
      found.setdefault(theirs, {})[match[2]] = x
  if unknown or not found:
    raise ValueError(f'{folder / WEIGHTS}: {len(unknown)} of its {len(tensors)} tensors belong to no layer of this '
                     'model, the first '
                     f'{unknown[:2]}; its layers are {list(modules)[:3]}, ... The adapter is of another model '
                     'or family.')
  return found


def _check_same(site, x, where):
  """The base's own weight in an adapter's file must be that of the model, if that is in floats."""
  w = site.variable.get_value()
  if hasattr(w, 'shape') and not hasattr(w, 'codes') and (w.shape != x.shape or not np.allclose(w, x, atol=1e-6)):
    raise ValueError(f"{where} of shape {x.shape} is not the weight of '{site.path}', of shape {w.shape}: it was "
                     "trained or "
                     'resized with the adapter. Put it into the model first.')


def _rule(config, theirs, site, parts):
  """The lora.LoRA of one layer."""
  matched = lambda pattern: next((v for k, v in (config.get(pattern) or {}).items()
                                  if re.fullmatch(rf'(.*\.)?({k})', theirs)), None)
  rank, alpha = matched('rank_pattern') or config['r'], matched('alpha_pattern') or config['lora_alpha']
  scaling = adapters.by_root_of_rank if config.get('use_rslora') else adapters.by_rank
  dropout = config.get('lora_dropout') or 0.0
  return lora.LoRA(re.escape(site.path), rank, alpha, scaling, dropout, dora=MAGNITUDE in parts)


def _fill(adapter, parts, site, outputs, where):
  """Puts arrays of the file into an Adapter."""
  back = None if outputs is None else np.argsort(outputs)
  reorder = lambda x: x if back is None else x[..., back]
  if site.kind == 'Embed':
    named = dict(A=('lora_embedding_B', lambda x: x), B=('lora_embedding_A', lambda x: x))
  else:
    named = dict(A=('lora_A', lambda x: x.T), B=('lora_B', lambda x: reorder(x.T)))
  if adapter.magnitude is not None:
    named['magnitude'] = (MAGNITUDE, lambda x: reorder(x.reshape(-1)))
  if set(parts) != {theirs for theirs, _ in named.values()}:
    raise ValueError(f'{where}: it has {sorted(parts)}, and should have {sorted(t for t, _ in named.values())}. The '
                     'adapter is not whole, or of a kind that is not read.')
  for ours, (theirs, change) in named.items():
    variable, x = getattr(adapter, ours), change(parts[theirs])
    if x.shape != variable.get_value().shape:
      raise ValueError(f'{where}: {theirs} has shape {parts[theirs].shape}, which becomes {x.shape}, and this layer '
                       f'takes {variable.get_value().shape}. The adapter is of another model.')
    variable.set_value(np.asarray(x, np.float32))
