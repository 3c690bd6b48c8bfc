"""Fills an abstract model with the tensors of a file, one after the other, the largest first.

The model never exists twice, and no random weights are drawn: beside it there is one tensor at a time, and when the
model is almost full, a small one.
"""

import difflib
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from qat.models.pretrained import names


def fill(make_model, tensors, table, where, ignored=()):
  """Makes a model whose variables are the tensors of a file, in float32.

  Args:
    make_model: () -> nnx.Module; it is traced and never run.
    tensors: Mapping of names to arrays, read when they are asked for.
    table: list[names.Name], with a row for every variable of the model.
    where: the file, for errors.
    ignored: regular expressions; the tensors that match need not be used.

  Returns:
    The model.
  """
  graph, state = nnx.split(nnx.eval_shape(make_model))
  variables = {'/'.join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
  found = {path: names.find(table, path) for path in variables}
  _check_names({path: theirs for path, (_, theirs) in found.items()}, tensors, where, ignored)
  filled = []
  for ours, (path, variable) in sorted(variables.items(), key=lambda item: -math.prod(item[1][1].shape)):
    row, theirs = found[ours]
    array = _array(tensors[theirs], row.change, variable, f'{where}: tensor {theirs!r}', ours)
    filled.append((path, variable.replace(array)))
  return nnx.merge(graph, nnx.from_flat_state(filled))


def _array(tensor, change, variable, what, ours):
  """One tensor as the array of its variable."""
  try:
    x = change(tensor)
  except ValueError as error:
    raise ValueError(f'{what} of shape {tensor.shape}: it cannot become {ours} of shape {variable.shape} ({error}). '
                     'The sizes in the metadata and the tensors disagree: get the file anew.') from error
  if x.shape != variable.shape:
    raise ValueError(
        f'{what} has shape {tensor.shape}, which becomes {x.shape}: {ours} has shape {variable.shape} by the sizes '
        'in the metadata. They disagree: get the file anew.')
  if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:  # those of a byte have their scale elsewhere
    raise ValueError(f'{what} has dtype {x.dtype}: weights are read from floating-point numbers of 16 bits or more. '
                     'Take the checkpoint that it was quantized from.')
  # In the variable's own memory, for XLA on the CPU may otherwise keep a view of the file's.
  return jax.device_put(np.array(x, variable.dtype, order='C'))


def _check_names(wanted, tensors, where, ignored):
  """Every variable has a tensor, and every tensor is used."""
  missing = {theirs: ours for ours, theirs in wanted.items() if theirs not in tensors}
  if missing:
    theirs, ours = next(iter(missing.items()))
    near = difflib.get_close_matches(theirs, list(tensors), n=3)
    raise ValueError(
        f'{where}: {len(missing)} of {len(wanted)} variables have no tensor, the first {ours!r}, which should be '
        f'{theirs!r}. The file has {len(tensors)} tensors{f", near it {near}" if near else ""}. '
        'It is not whole, or of another form than its metadata say: get it anew.')
  used = set(wanted.values())
  extra = [name for name in tensors if name not in used and not any(re.fullmatch(p, name) for p in ignored)]
  if extra:
    raise ValueError(
        f'{where}: {len(extra)} tensors have no place in the model, the first {sorted(extra)[:3]}. Without them it '
        'would be another network: its form is not supported, or its metadata are wrong.')
