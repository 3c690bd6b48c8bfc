"""One run on many machines: the same command on each, and JAX's own runtime between them.

    qat train ... --coordinator 10.0.0.1:8476 --processes 2 --process_id 0     # and 1, on the other machine
    qat train ... --coordinator auto          # JAX asks SLURM, Cloud TPU, MPI, Kubernetes

The environment's QAT_COORDINATOR, QAT_PROCESSES and QAT_PROCESS_ID say the same. Under SLURM with several tasks, and on
TPU slices of several hosts, it is `auto` by itself. --workdir must be on a disk that all share.

Process 0 prints and writes everything; the others are silent, but for errors. When a process is lost, the others end
with exit code LOST: the same commands, started together, go on from the last checkpoint.
https://docs.jax.dev/en/latest/multi_process.html
"""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import traceback
import warnings

from flax import nnx
import jax
from jax.experimental import multihost_utils
import numpy as np

from qat.run import errors

FLAGS = ('coordinator', 'processes', 'process_id')
AUTO = 'auto'
LOST = int(signal.SIGABRT)  # JAX's runtime aborts where another process is gone, and `tidy` makes that an exit code.
AGAIN = 'Start all of them again: they go on from the last checkpoint.'
START_SECONDS = 300     # For all processes to come.
OWN = 'INVALID_ARGUMENT', 'RESOURCE_EXHAUSTED', 'UNIMPLEMENTED', 'NOT_FOUND'  # XLA's words for what is no one else's.
HEARTBEAT_SECONDS = 60     # A process that is silent for so long is lost; a closed connection is noticed at once.


def split(argv):
  """(the flags of this file {name: text}, the other arguments)."""
  found, rest, argv = {}, [], iter(argv)
  for arg in argv:
    name, equals, value = arg.removeprefix('--').partition('=')
    if arg.startswith('--') and name in FLAGS:
      found[name] = value if equals else next(argv, '')
    else:
      rest.append(arg)
  return found, rest


def settings(flags, environ):
  """(coordinator, processes, process_id), (AUTO, None, None), or None for one process."""
  told = {name: flags.get(name, environ.get(f'QAT_{name.upper()}', '')) for name in FLAGS}
  if not any(told.values()):
    return (AUTO, None, None) if is_detected(environ) else None
  if told['coordinator'] == AUTO:
    return AUTO, None, None
  if missing := [name for name in FLAGS if not told[name]]:
    there = {name: value for name, value in told.items() if value}
    raise ValueError(f'{there}: {missing} are not given. Give --coordinator host:port, --processes and --process_id '
                     f'(or QAT_{missing[0].upper()}, ...), or --coordinator auto where SLURM or Cloud TPU knows them.')
  host, colon, port = told['coordinator'].rpartition(':')
  if not (host and colon and port.isdecimal()):
    raise ValueError(f'--coordinator {told["coordinator"]!r}: it is no host:port. Write that of process 0, such as '
                     '10.0.0.1:8476.')
  if not (told['processes'].isdecimal() and told['process_id'].isdecimal()
          and int(told['process_id']) < int(told['processes'])):
    raise ValueError(f'--processes {told["processes"]} --process_id {told["process_id"]}: processes are numbered from '
                     '0 to one less than there are. Correct one of them.')
  return told['coordinator'], int(told['processes']), int(told['process_id'])


def is_detected(environ):
  """Whether this is one of several tasks of SLURM, or a host of a TPU slice of several."""
  tasks = environ.get('SLURM_NTASKS', '1') if 'SLURM_PROCID' in environ and 'SLURM_STEP_NODELIST' in environ else '1'
  return int(tasks) > 1 or ',' in environ.get('TPU_WORKER_HOSTNAMES', '')


@contextlib.contextmanager
def session(flags, environ=os.environ):
  """Joins the other processes, if there are any, for as long as the block runs.

  A process that fails leaves without waiting for the others, which then know that it is gone.
  """
  found = settings(flags, environ)
  if found is None:
    yield
    return
  join(*found)
  tell = tidy(f'qat, {name()}: it was ended, or another process is gone and JAX ended this one. {AGAIN}\n')
  try:
    with open(os.devnull, 'w') as nowhere:
      with contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(nowhere):
        yield
    multihost_utils.sync_global_devices('done')
    tell()
  except BaseException as error:
    tell()
    leave(error)


def name():
  """This process, in words."""
  return f'process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}'


def tidy(text):
  """Lets this process end with a message and with LOST where JAX's runtime aborts it, in a thread of its own.

  A child waits for the end of this process, and then prints `text`.

  Returns:
    a function without arguments; once it was called, the child prints nothing.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(libc._exit, ctypes.c_void_p))  # It is called with the signal's number.
  ends, tells = os.pipe()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')                                      # Forks and threads: it reads, prints and ends.
    child = os.fork()
  if child:
    os.close(ends)
    return lambda: os.write(tells, b'.')
  os.close(tells)
  for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(s, signal.SIG_IGN)
  if not os.read(ends, 1):
    os.write(2, text.encode())
  os._exit(0)


def join(coordinator, processes, process_id):
  """Starts JAX's runtime between processes."""
  who = {} if coordinator == AUTO else dict(
      coordinator_address=coordinator, num_processes=processes, process_id=process_id)
  try:
    jax.distributed.initialize(**who, initialization_timeout=START_SECONDS,
                               heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except (ValueError, RuntimeError) as error:
    what = '--coordinator auto' if coordinator == AUTO else f'Process {process_id} of {processes} at {coordinator}'
    raise ValueError(f'{what}: the processes did not find each other ({errors.join(error)[:300]}). Start all of them '
                     f'within {START_SECONDS} seconds, with one --coordinator and one --process_id each; its port must '
                     'be free and open.') from error


def leave(error):
  """Says what ended this process, and ends it at once: at exit JAX would wait for processes that wait for this one."""
  code, text = verdict(error)
  print(f'qat, {name()}: {text}', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def verdict(error):
  """(exit code, text) of what ended a process."""
  if isinstance(error, SystemExit):
    return error.code or 0, 'it ends.'
  if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(OWN):
    return LOST, f'another process is gone, or cannot be reached ({errors.join(error)[:200]}). {AGAIN}'
  text = errors.paragraph(error)
  return (2, text) if text is not None else (1, ''.join(traceback.format_exception(error)))


def is_first():
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def from_first(value):
  """A whole number as process 0 has it; the others' is not looked at."""
  return int(multihost_utils.broadcast_one_to_all(np.int64(value if is_first() else 0)))


def is_key(x):
  """Whether an array is of random keys."""
  return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def put(x, home):
  """An array that every process has whole, placed as the sharding `home` says; random keys too."""
  if is_key(x):
    wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
    return jax.jit(wrap, out_shardings=home)(put(jax.random.key_data(x), home))
  host = np.asarray(x)
  return jax.make_array_from_callback(host.shape, home, lambda index: host[index])


def fetch(x):
  """A numpy copy of an array that may be spread over processes, all of which must ask; random keys as numbers."""
  if is_key(x):
    x = jax.random.key_data(x)
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = x.addressable_data(0) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)
  return np.array(x)


def local(tree):
  """A tree whose arrays are whole, in this machine's own memory if they were split; all processes must ask."""
  cpu = jax.local_devices(backend='cpu')[0]

  def one(x):
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
      return x
    return put(jax.random.wrap_key_data(fetch(x), impl=jax.random.key_impl(x)) if is_key(x) else fetch(x),
               jax.sharding.SingleDeviceSharding(cpu))

  return jax.tree.map(one, tree)


def local_model(model):
  """A module whose arrays this process has, so that it can be looked at by this process alone: see `local`."""
  if jax.process_count() == 1:
    return model
  graph, arrays = nnx.split(model)
  return nnx.merge(graph, local(arrays))


class Together:
  """A stop.Stop that all processes see at the same step: true one step after the first of them heard a signal."""

  def __init__(self, stopped):
    self.stopped, self.last, self.asked = stopped, None, stopped.asked

  def __bool__(self):
    if jax.process_count() == 1:
      self.asked = self.stopped.asked
      return bool(self.stopped)
    mine = np.full((1,), self.stopped.asked or 0, np.int32)
    before, self.last = self.last, _highest(mine)
    if before is not None and (number := int(before)):
      self.asked = signal.Signals(number)
    return self.asked is not None


def _highest(mine):
  """The highest of the processes' numbers, on its way: nothing waits here.

  All devices take part, as in a step: XLA's CPU backend keeps the order of such programs only.
  """
  split, highest = _reduction()
  here = np.repeat(mine, jax.local_device_count())
  return highest(jax.make_array_from_process_local_data(split, here, (jax.device_count(),)))


@functools.cache
def _reduction():
  """(sharding of a number a device, the jitted maximum)."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), 'devices')
  split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (('devices',), ()))
  return split, jax.jit(jax.numpy.max, out_shardings=whole)
