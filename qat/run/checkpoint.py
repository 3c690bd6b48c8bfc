"""Checkpoints: the whole state of a run, written by orbax, checked when read.

    <workdir>/checkpoints/<step>/state    the arrays, {path: array}
    <workdir>/checkpoints/<step>/about    JSON: data position, metrics, seconds, a checksum an array

Orbax writes in the background into a temporary folder and renames it when whole, so that a
kill leaves the checkpoints before it. The last ones and the best one are kept. What is damaged
later (a checksum differs, a file is gone) is moved to <workdir>/damaged, and the one before is used.
"""

import contextlib
import errno
import json
import pathlib
import shutil
import sys
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from qat.run import errors
from qat.run import hosts

STATE, ABOUT = 'state', 'about'
SPARE_BYTES = 2**20  # Metadata, metrics, and the report.
DAMAGED = 'Use another checkpoint, or train again.'
ANOTHER = 'Use the config of that run, or another --workdir.'
policies = ocp.checkpoint_managers


class Checkpoints:
  """Writes checkpoints in the background; keeps the last few and the best."""

  def __init__(self, workdir, score, keep):
    """`score` ranks the metrics of evaluations, higher is better; `keep` is how many last ones stay."""
    self.directory = folder(workdir)
    best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept, cleanup_tmp_directories=True,
        **dict(multiprocessing_options=alone, create=False) if jax.process_count() > 1 else {})
    self.manager = None
    if hosts.is_first():
      self.directory.mkdir(parents=True, exist_ok=True)
      self.manager = ocp.CheckpointManager(self.directory, options=options)

  def save(self, step, state, about, metrics=None):
    """Copies `state` to the host and writes it in the background.

    Args:
      step: int.
      state: a pytree of arrays.
      about: a dict for JSON.
      metrics: those of an evaluation at this step, if there was one.
    """
    arrays = to_host(state)
    if self.manager is None or step in self.manager.all_steps():
      return
    _check_space(self.directory, sum(x.nbytes for x in arrays.values()))
    about = dict(about, metrics=metrics, checksums={k: checksum(x) for k, x in arrays.items()})
    self.manager.save(step, metrics=metrics, args=ocp.args.Composite(
        **{STATE: ocp.args.StandardSave(arrays), ABOUT: ocp.args.JsonSave(about)}))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """Waits until everything is on disk."""
    if self.manager is None:
      return
    try:
      self.manager.wait_until_finished()
    finally:
      self.manager.close()


def _check_space(directory, size_bytes):
  """Raises while there is still room to say so: orbax's threads print a page each when the disk is full."""
  free = shutil.disk_usage(directory).free
  if free < size_bytes + SPARE_BYTES:
    raise OSError(errno.ENOSPC, f'{free:,} bytes are free, a checkpoint takes {size_bytes:,}', str(directory))


def folder(workdir):
  return pathlib.Path(workdir).resolve() / 'checkpoints'


def steps(workdir):
  """The steps that have a checkpoint, first to last."""
  return sorted(int(p.name) for p in folder(workdir).glob('*') if p.name.isdigit())


def restore(workdir, like):
  """(state, about) of the last checkpoint that is whole, or None when there is no checkpoint.

  Args:
    workdir: the run's folder.
    like: a state whose structure, shapes and dtypes the checkpoint must have, and in whose places it is put.
  """
  step, restored = _last_whole(workdir, like) if hosts.is_first() else (None, None)
  if jax.process_count() == 1:
    return restored
  step = hosts.from_first(-1 if step is None else step)
  if step >= 0 and step not in steps(workdir):
    raise ValueError(f'--workdir {str(workdir)!r}: process {jax.process_index()} finds no checkpoint of step {step} '
                     'there, and process 0 does. Give a folder on a disk that all processes share.')
  return read(workdir, step, like) if step >= 0 and restored is None else restored


def _last_whole(workdir, like):
  """(step, what `restore` returns) of the last checkpoint that is whole; (None, None) when there is none."""
  damaged = []
  for step in reversed(steps(workdir)):
    try:
      restored = read(workdir, step, like)
    except Damaged as error:
      damaged.append(step)
      set_aside(workdir, step, error)
      continue
    if damaged:
      print(f'WARNING: going on from the checkpoint of step {step} in place of {damaged[0]}.', file=sys.stderr)
    return step, restored
  if damaged:
    raise ValueError(f'Every checkpoint of {str(workdir)!r} is damaged: steps {sorted(damaged)}. They were moved '
                     f'to {pathlib.Path(workdir) / "damaged"}. Restore the folder from a copy, or start again in '
                     'another --workdir.')
  return None, None


def best_step(workdir, score):
  """The step whose evaluation scored highest, or None; the later one wins a tie."""
  scored = []
  for step in steps(workdir):
    with contextlib.suppress(Damaged):  # `read` speaks of it when it is asked for.
      if metrics := about(workdir, step)['metrics']:
        scored.append((score(metrics), step))
  return max(scored)[1] if scored else None


class Damaged(ValueError):
  """A checkpoint that is not what was written."""


def about(workdir, step):
  """The JSON of one checkpoint."""
  path = folder(workdir) / str(step) / ABOUT / 'metadata'
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise Damaged(f'Checkpoint {step} of {str(workdir)!r} is damaged: {path.parent.name}/{path.name} cannot be read '
                  f'({error}). {DAMAGED}') from error


def read(workdir, step, like):
  """(state, about) of one checkpoint that has the arrays of `like` and no others.

  Raises:
    Damaged: an array is missing, unreadable, or has another checksum than when it was written.
    ValueError: it is whole, and of another model.
  """
  if extra := sorted(set(about(workdir, step)['checksums']) - set(flatten(like))):
    raise ValueError(f'Checkpoint {step} of {str(workdir)!r} is of another model: it has {extra[:4]} besides. '
                     f'{ANOTHER}')
  return read_part(workdir, step, like)


def read_part(workdir, step, like):
  """(state, about) of one checkpoint, of which `like` may be a part: to evaluate needs no optimizer."""
  facts, wanted = about(workdir, step), flatten(like)
  if missing := sorted(set(wanted) - set(facts['checksums'])):
    raise ValueError(f'Checkpoint {step} of {str(workdir)!r} is of another model: it lacks {missing[:4]}. {ANOTHER}')
  leaves = []
  for name, x in wanted.items():
    array = array_of(workdir, step, name)
    if checksum(array) != facts['checksums'][name]:
      raise Damaged(f'Checkpoint {step} of {str(workdir)!r} is damaged: array {name!r} has another checksum than '
                    f'when it was written. {DAMAGED}')
    shape = jax.random.key_data(x).shape if _is_key(x) else x.shape
    if array.shape != shape:
      raise ValueError(f'Checkpoint {step} of {str(workdir)!r} is of another model: {name} is {array.shape} '
                       f'there and {shape} here. {ANOTHER}')
    leaves.append(_like(array, x))
  return jax.tree.unflatten(jax.tree.structure(like), leaves), facts


def array_of(workdir, step, name):
  """One array of a checkpoint, read by tensorstore itself.

  Orbax reads all at once, and leaves a stack trace a thread on stderr when one array is damaged.
  """
  path = folder(workdir) / str(step) / STATE
  store = dict(driver='zarr', kvstore=dict(driver='ocdbt', base=f'file://{path}/', path=name))
  try:
    return tensorstore.open(store, open=True, read=True).result().read().result()
  except ValueError as error:  # Tensorstore's word for bytes gone or changed.
    raise Damaged(f'Checkpoint {step} of {str(workdir)!r} is damaged: array {name!r} cannot be read '
                  f'({str(error)[:200]}). {DAMAGED}') from error


def flatten(state):
  """{'params/layers/0/kernel': leaf} of a state."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}


def to_host(state):
  """{name: a numpy copy} of a state: the next step may write over its buffers. Random keys as numbers.

  All processes must ask; only the first keeps the copies.
  """
  copies = ((name, hosts.fetch(x)) for name, x in flatten(state).items())
  first = hosts.is_first()
  return {name: x for name, x in copies if first}


def _like(array, x):
  """`array` as a jax array of the kind of `x`, where `x` is."""
  made = jax.random.wrap_key_data(array, impl=jax.random.key_impl(x)) if _is_key(x) else array
  home = getattr(x, 'sharding', None)
  if isinstance(home, jax.sharding.NamedSharding):
    return hosts.put(made, home)
  return jax.numpy.asarray(made)


def _is_key(x):
  return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def checksum(array):
  """CRC-32 of an array's bytes."""
  return zlib.crc32(np.ascontiguousarray(array).tobytes())


def set_aside(workdir, step, error):
  """Says so on stderr, and moves a damaged checkpoint out of the way."""
  aside = pathlib.Path(workdir) / 'damaged' / str(step)
  print(f'WARNING: {errors.join(error)} It is moved to {aside}.', file=sys.stderr)
  shutil.rmtree(aside, ignore_errors=True)
  aside.parent.mkdir(exist_ok=True)
  shutil.move(folder(workdir) / str(step), aside)
