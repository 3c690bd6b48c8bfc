"""Models in bitsandbytes' 4-bit layout: NF4 and FP4, with and without double quantization, in safetensors.

https://huggingface.co/docs/bitsandbytes and its QuantState.as_dict(packed=True). Of a weight [out, in]:

    weight                  u8[n / 2, 1]     row after row, two codes a byte, the first in the high half
    weight.absmax           f32[n / block], or u8, codes of the dynamic map, under double quantization
    weight.quant_map        f32[16]
    weight.nested_absmax    f32[n / block / 256], weight.nested_quant_map f32[256]
    weight.quant_state.bitsandbytes__nf4     u8, the bytes of a JSON object: block sizes, shape, dtype, nested offset

    save(qat.freeze(qat.quantize(model, qat.recipes.get('nf4_dq'))), 'model.safetensors', families.FAMILIES['llama'])
    model = load(model_in_floats, 'model.safetensors', families.FAMILIES['llama'])

Weights that are not quantized are stored in floats, under the family's names.
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

from qat.core import codebooks, packing
from qat.core.blocks import Flat
from qat.core.qarray import Min, QArray, Spec
from qat.export import files
from qat.models import rope
from qat.models.pretrained import names
from qat.nn import quantized, recipes, rules, transform, weights

# Theirs by code: the fourth bit of FP4 is the sign, and there are two zeros.
NF4_BY_CODE = np.float32(codebooks.NF4.levels())
FP4_BY_CODE = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12)
TYPES = dict(nf4=(codebooks.NF4, NF4_BY_CODE),
             fp4=(codebooks.FP4_BNB, np.concatenate([FP4_BY_CODE, -FP4_BY_CODE])))
NESTED = 256
STATE = '.quant_state.bitsandbytes__'


def tensors(q, dtype='float32'):
  """{'' or '.<part>': array} of the kernel QArray[in, out] on a grid of specs.kernel(NF4), FP4_BNB or NF4_DQ."""
  kind = next((k for k, (book, _) in TYPES.items() if book == q.spec.format), None)
  if kind is None or not isinstance(q.spec.block, Flat) or not q.spec.block.columns or q.codes.ndim != 2:
    raise ValueError(f'A QArray{list(q.shape)} on {q.spec}: bitsandbytes has NF4 and FP4 of kernels [in, out], in '
                     'runs down their '
                     "columns. Quantize by the recipe 'nf4', 'nf4_dq' or 'fp4_bnb'.")
  book, levels = TYPES[kind]
  to_theirs = np.asarray([int(np.flatnonzero(levels == v)[0]) for v in np.float32(book.levels())], np.uint8)
  codes = to_theirs[np.asarray(q.codes).T.ravel()]
  state = dict(quant_type=kind, blocksize=q.spec.block.size, dtype=dtype, shape=list(q.shape[::-1]))
  parts = {'': _packed(codes), '.quant_map': levels}
  if isinstance(q.scale, QArray):
    _check_nested(q.scale)
    parts |= {'.absmax': np.asarray(q.scale.codes), '.nested_absmax': np.asarray(q.scale.scale),
              '.nested_quant_map': np.float32(codebooks.DYNAMIC8.levels())}
    offset = float(np.asarray(q.scale.zero).ravel()[0])
    state |= dict(nested_blocksize=NESTED, nested_dtype='float32', nested_offset=offset)
  else:
    parts['.absmax'] = np.asarray(q.scale, np.float32)
  return parts | {STATE + kind: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def _packed(codes):
  return np.asarray(packing.pack(jnp.asarray(codes), codebooks.NF4, packing.HighFirst())).reshape(-1, 1)


def _check_nested(scale):
  if scale.spec.format != codebooks.DYNAMIC8 or scale.spec.block != Flat(NESTED):
    raise ValueError(f'Scales on {scale.spec}: bitsandbytes keeps them on the dynamic map, in runs of {NESTED}. '
                     'Quantize by '
                     "the recipe 'nf4_dq'.")


def qarray(parts, where=''):
  """The QArray[in, out] that `tensors` took apart; `where` is for errors."""
  try:
    name = next(k for k in parts if k.startswith(STATE))
    state = json.loads(bytes(parts[name]).decode())
    book, levels = TYPES[state['quant_type']]
    (outputs, inputs), size = state['shape'], state['blocksize']
    if not np.array_equal(parts['.quant_map'], levels):
      raise ValueError(f'its quant_map is not that of {state["quant_type"]}')
    to_ours = np.searchsorted(np.float32(book.levels()), levels).astype(np.uint8)
    codes = packing.unpack(jnp.asarray(parts['']).ravel(), codebooks.NF4, outputs * inputs, packing.HighFirst())
    codes = to_ours[np.asarray(codes)].reshape(outputs, inputs).T
    scale, scale_spec = _scale(parts, state)
  except (StopIteration, KeyError, ValueError, UnicodeDecodeError) as error:
    raise ValueError(f'{where}: it is no 4-bit weight in bitsandbytes\' layout, or not whole ({error!r}). Get it '
                     'anew.') from error
  return QArray(jnp.asarray(codes), scale, None, Spec(book, Flat(size, columns=True), scale_spec))


def _scale(parts, state):
  """(absmax, its Spec): floats, or codes under double quantization."""
  if 'nested_offset' not in state:
    return jnp.asarray(parts['.absmax'], jnp.float32), None
  if state['nested_blocksize'] != NESTED or not np.array_equal(parts['.nested_quant_map'],
                                                              np.float32(codebooks.DYNAMIC8.levels())):
    raise ValueError('its absmax is on another map than the dynamic one in runs of 256')
  spec = Spec(codebooks.DYNAMIC8, Flat(NESTED), zero=Min())
  offset = jnp.full(1, state['nested_offset'], jnp.float32)
  return QArray(jnp.asarray(parts['.absmax']), jnp.asarray(parts['.nested_absmax']), offset, spec), spec


def save(model, path, family, overwrite=False):
  """Writes a frozen model: its 4-bit weights in this layout, and everything else in floats.

  Args:
    model: what qat.freeze returned; codes on other grids are refused.
    path: of a .safetensors file.
    family: family.Family, by whose names weights are called.
  """
  path, found = pathlib.Path(path), {}
  if path.exists() and not overwrite:
    raise ValueError(f'{path} is there already. Name another file, or give overwrite=True.')
  if getattr(getattr(getattr(model, 'config', None), 'rope', None), 'turn', None) is rope.interleaved:
    raise ValueError("This model turns neighbours by their positions, as GGUF's do, and Hugging Face's the halves of "
                     "a head: rows "
                     'of its queries and keys would have to move between blocks. Quantize decoder.halved(model) '
                     'instead.')
  for ours, variable in _variables(model).items():
    row, theirs = names.find(family.table, ours)
    stored = theirs if theirs.startswith('lm_head') else family.prefix + theirs
    if isinstance(variable, weights.Codes):
      found |= {stored + part: x for part, x in tensors(variable.get_value()).items()}
    else:
      found[stored] = _theirs(np.asarray(variable.get_value()), row, ours)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, safetensors.numpy.save({k: np.ascontiguousarray(x) for k, x in found.items()}, {'format': 'pt'}))


def load(model, path, family):
  """A frozen copy of `model`, a float model of the same sizes, with all that the file holds."""
  path = pathlib.Path(path)
  try:
    stored = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path}: it cannot be read ({error}), or is not whole. Get it anew.') from error
  wanted = {ours: names.find(family.table, ours)[1] for ours in _variables(model)}
  bare = {k.removeprefix(family.prefix): x for k, x in stored.items()}
  if missing := [theirs for theirs in wanted.values() if theirs not in bare]:
    raise ValueError(f'{path}: {len(missing)} of {len(wanted)} weights of the model are not there, the first '
                     f'{missing[0]!r}. The file is of another model.')
  parts = {ours: {k[len(theirs):]: x for k, x in bare.items() if k == theirs or k.startswith(f'{theirs}.')}
           for ours, theirs in wanted.items()}
  codes = {ours: qarray(p, f'{path}: {wanted[ours]}') for ours, p in parts.items() if len(p) > 1}
  model = nnx.clone(model)
  for ours, variable in _variables(model).items():
    if ours not in codes:
      row, _ = names.find(family.table, ours)
      variable.set_value(_ours(parts[ours][''], variable, row, f'{path}: {wanted[ours]}'))
  return _frozen(model, codes, path)


def _frozen(model, codes, path):
  """`model` with QArrays {path of the variable: q} in place of floats."""
  sites = {f'{s.path}/{s.name}': s for s in rules.sites(model) if s.name is not None}
  for ours, q in codes.items():
    shape = sites[ours].layout.to_matrix(sites[ours].variable.get_value()).shape
    if q.shape != shape:
      raise ValueError(f"{path}: the weight of '{sites[ours].path}' is {q.shape} there, and {shape} in the model. The "
                       "file is of "
                       'another model.')
  rows = lambda spec: dataclasses.replace(spec, block=Flat(spec.block.size))
  recipe = [rule for ours, q in codes.items()
            for rule in recipes.at(re.escape(sites[ours].path), recipes.standard(rows(q.spec), inputs=False))]
  if not recipe:
    return model
  model = transform.quantize(model, [*recipe, *recipes.get('float')])
  transform.hold(model, {sites[ours].path: q for ours, q in codes.items()})
  return model


def _variables(model):
  """{path: Variable} of the weights, each once."""
  found = {}
  for path, module in quantized.walk(model):
    for name, value in vars(module).items():
      if isinstance(value, (nnx.Param, weights.Codes)):
        found.setdefault(id(value), (f'{path}/{name}'.lstrip('/'), value))
  return dict(found.values())


def _theirs(x, row, ours):
  """A float weight as the file has it."""
  if row.change is names.transposed:
    return x.T
  if row.change is names.plus_one:
    return x - 1
  if row.change is names.unchanged:
    return x
  raise ValueError(f"'{ours}' is part of a tensor in the family's files, which are not written. Families of Llama's "
                   "form are.")


def _ours(x, variable, row, where):
  x = np.asarray(row.change(x), np.float32)
  if x.shape != variable.get_value().shape:
    raise ValueError(f'{where} has shape {x.shape} here, and {variable.get_value().shape} in the model. The file is '
                     'of another model.')
  return jnp.asarray(x)
