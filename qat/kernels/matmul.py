"""One product for every grid: x @ w where w is in codes, by the best implementation there is.

`matmul_xla.decoded` is the definition. An implementation that is named and cannot run raises; where none is named, XLA
does what no kernel supports, and `explain` tells.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qat.core import qarray, specs
from qat.kernels import (
    block_scaled, device, matmul_cpu, matmul_gpu, matmul_tpu, matmul_xla, pipeline_gpu, prepared, scaled_matmul_gpu,
    tuned)

# Each has LAYOUT, unsupported(x, w), prepare(q), matmul(x, p, **settings of a Kernel) and decode(p, dtype).
MODULES = {'gpu': matmul_gpu, 'tpu': matmul_tpu, 'cpu': matmul_cpu}
# The same for inputs in codes.
CODE_MODULES = {'gpu': scaled_matmul_gpu, 'tpu': matmul_tpu, 'cpu': matmul_cpu}
# Of Blackwell, which has no kernel for inputs that are floats.
BLACKWELL = CODE_MODULES | {'gpu': block_scaled}
# What a weight is prepared for is multiplied by its own kernel.
LAYOUTS = {module.LAYOUT: module for modules in (MODULES, CODE_MODULES, BLACKWELL) for module in modules.values()}
# What is made of a QArray at each call, where that is not what is made once.
FOR_ONE_CALL = {'tpu': functools.partial(matmul_tpu.prepare, fewest=4)}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An implementation with settings: Kernel('tpu', interpret=True) runs the TPU's kernel without a TPU.

  Attributes:
    name: of MODULES.
    tiles: the kernel's own Tiles; those timed on this device, or else by its heuristic, if not given.
    interpret: what pl.pallas_call takes, of GPU and TPU.
    level: of instructions, of CPU; see matmul_cpu.
  """
  name: str
  tiles: Any = None
  interpret: Any = None
  level: str | None = None

  def __post_init__(self):
    check_name(self.name, 'Kernel')

  def unsupported(self, x, w):
    """Why x @ w does not run, or None, whatever the device."""
    module = _modules(isinstance(x, qarray.QArray), w)[self.name]
    if isinstance(w, prepared.Prepared) and w.layout != module.LAYOUT:
      return f'the weight is in layout {w.layout!r}, and this kernel reads {module.LAYOUT!r}'
    return module.unsupported(x, w)

  def __call__(self, x, w):
    """[*rows, k], [k, n] -> [*rows, n]; [m, k] if x is a QArray."""
    module = _modules(isinstance(x, qarray.QArray), w)[self.name]
    p = w if isinstance(w, prepared.Prepared) else FOR_ONE_CALL.get(self.name, module.prepare)(w)
    settings = {key: getattr(self, key) for key in ('tiles', 'interpret', 'level') if getattr(self, key) is not None}
    matrix = x if isinstance(x, qarray.QArray) else x.reshape(-1, x.shape[-1])
    if self.tiles is None and hasattr(module, 'Tiles') and (found := tuned.find(matrix, p, module.Tiles)):
      settings['tiles'] = found
    return module.matmul(matrix, p, **settings).reshape(*x.shape[:-1], w.shape[-1])


def check_name(name, what):
  """Raises unless there are kernels of that name."""
  if name not in MODULES:
    raise ValueError(f'{what} {name!r}: kernels are of {list(MODULES)}. Name one of them.')


def _modules(codes, w):
  """The modules for inputs in codes or in floats: of Blackwell for its layout, or on it for a QArray."""
  if not codes:
    return MODULES
  blackwell = w.layout == block_scaled.LAYOUT if isinstance(w, prepared.Prepared) else block_scaled.available()
  return BLACKWELL if blackwell else CODE_MODULES


def matmul(x, w, *, implementation=None):
  """x @ w for a weight in codes, of which no decoded copy is written to memory where a kernel runs.

  Args:
    x: float[*batch, *rows, k], or QArray[*rows, k], whose product is then of codes.
    w: QArray[*batch, k, n], or what `prepare` made of a QArray[k, n].
    implementation: 'xla', 'gpu', 'tpu' or 'cpu'; a Kernel; or None for the best there is.

  Returns:
    [*batch, *rows, n], summed in f32: in the dtype of x, or f32 if x is a QArray. In a program that XLA divides among
    devices, and not jax.shard_map, the best there is is XLA.

  Raises:
    NotImplementedError: what was named cannot run here, and why.

  >>> w = qarray.encode(jnp.eye(2), qarray.Spec(qarray.formats.INT8, (None, 1)))
  >>> matmul(jnp.array([[3.0, 4.0]]), w)
  Array([[3., 4.]], dtype=float32)
  """
  _check(x, w)
  kernel = choose(x, w, implementation)
  run = _by_xla if kernel is None else kernel
  if kernel is not None and not kernel.interpret:  # Interpreters have effects, and run as they are.
    run = functools.partial(device.undivided, kernel, _by_xla, always=implementation is not None)
  if not isinstance(x, qarray.QArray):
    return _weight_only(run, x, w)
  return run(_rows(x), w).reshape(*x.shape[:-1], w.shape[-1])


def _by_xla(x, w):
  """The product in XLA of any two that `matmul` takes."""
  if isinstance(w, prepared.Prepared):
    x = qarray.decode(x) if isinstance(x, qarray.QArray) else x
    return matmul_xla.product(x, decode(w, x.dtype))
  return (matmul_xla.codes_by_codes if isinstance(x, qarray.QArray) else matmul_xla.best)(x, w)


def prepare(q, target=None, inputs=None):
  """A weight in the layout of a kernel: made once, and never written to a file.

  Args:
    q: QArray[k, n].
    target: 'gpu', 'tpu' or 'cpu'; of this process' default device if not given.
    inputs: the Spec of the QArrays that it will multiply; floats if not given.

  Returns:
    Prepared[k, n].
  """
  target = target or jax.default_backend()
  check_name(target, 'A weight is prepared for')
  return _modules(inputs is not None, q)[target].prepare(q)


def decode(w, dtype=jnp.float32):
  """The numbers of a weight in codes, prepared or not: dtype[*batch, k, n]."""
  if isinstance(w, prepared.Prepared):
    return LAYOUTS[w.layout].decode(w, dtype)
  return matmul_xla.numbers(w, dtype)


def choose(x, w, implementation=None):
  """The kernel that multiplies x by w, or None for XLA."""
  if implementation is None:
    named = isinstance(w, prepared.Prepared)
    name = w.target if named else jax.default_backend()
    if not named and name != 'tpu':  # Others want codes in another order: XLA is faster than to sort them at each call.
      return None
    why = _unsupported(Kernel(name), x, w)
    if why and named:
      raise NotImplementedError(f'A weight in layout {w.layout!r} is multiplied by its own kernel, which cannot run: '
                                f'{why}. Keep the QArray.')
    return None if why else Kernel(name)
  if implementation == 'xla':
    if isinstance(w, prepared.Prepared):
      raise ValueError(f"implementation='xla' multiplies QArrays, and the weight is in layout {w.layout!r}. Give the "
                       'QArray that it was prepared from.')
    return None
  if isinstance(implementation, str):
    check_name(implementation, 'implementation')
    if why := unavailable(implementation, x, w):
      raise NotImplementedError(f"implementation={implementation!r}: {why}. Give 'xla', or None for the best there is.")
    implementation = Kernel(implementation)
  if why := _unsupported(implementation, x, w):
    raise NotImplementedError(f'{implementation} cannot multiply {_described(x)} by {_described(w)}: {why}. '
                              "Give implementation='xla', or None for the best there is.")
  return implementation


def unavailable(name, x, w):
  """Why this process' default device does not run the kernels of a name for operands such as x and w, or None."""
  if jax.default_backend() != name:
    return f'the default device of this process is of {jax.default_backend()!r}'
  blackwell = _modules(isinstance(x, qarray.QArray), w)[name] is block_scaled and block_scaled.available()
  return None if name != 'gpu' or blackwell else pipeline_gpu.needs_hopper(jax.devices()[0])


def explain(x, w):
  """{implementation: why it does not run x @ w, or None}, whatever the device; 'gpu' is Hopper but on Blackwell."""
  return {name: _unsupported(Kernel(name), x, w) for name in MODULES} | {'xla': None}


def _unsupported(kernel, x, w):
  """Why a kernel cannot run x @ w, or None."""
  if w.ndim != 2:
    return f'the weight of shape {w.shape} is a stack; kernels multiply one matrix: use jax.vmap'
  rows = math.prod(x.shape[:-1])
  if rows == 0:
    return f'the input of shape {x.shape} is empty'
  if isinstance(x, qarray.QArray):
    return kernel.unsupported(x if x.ndim == 2 else jax.eval_shape(_rows, x), w)
  return kernel.unsupported(jax.ShapeDtypeStruct((rows, x.shape[-1]), x.dtype), w)


def _check(x, w):
  if not isinstance(w, qarray.QArray | prepared.Prepared):
    raise TypeError(f'The weight is a {type(w).__name__}, and has no codes. Give a QArray, such as '
                    'qat.encode(w, qat.specs.integer(4, (128, 1))), or use x @ w.')
  lead = len(w.shape) - 2
  if lead < 0 or len(x.shape) <= lead or x.shape[-1] != w.shape[-2] or x.shape[:lead] != w.shape[:lead]:
    raise ValueError(f'x of shape {tuple(x.shape)} by a weight of shape {tuple(w.shape)}: the last axis of x is the '
                     'inputs, as is the axis before the last of the weight, whose leading axes lead x too. Transpose '
                     'one of them.')
  if isinstance(x, qarray.QArray) and lead:
    raise ValueError(f'x of shape {tuple(x.shape)} and a weight of shape {tuple(w.shape)} both have codes, and the '
                     'weight is a stack. Use jax.vmap.')
  if not isinstance(x, qarray.QArray) and not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x is {x.dtype}; a weight in codes multiplies floats, or a QArray. Cast x, or encode it.')


def _rows(x):
  """QArray[*rows, k] as one matrix, whose scales are one a row, one for all or those of Blackwell: QArray[m, k]."""
  if x.ndim == 2:
    return x
  flat = lambda a: None if a is None else a.reshape(-1, a.shape[-1])
  if block_scaled.fits(x, -1):                                           # Scales that are read as they are.
    codes, scale = x.scale.codes, x.scale.scale
    if scale is not None:                                                # One a matrix of rows: now one a row.
      scale = jnp.broadcast_to(qarray.decode(scale), (*codes.shape[:-1], 1))
    spec = dataclasses.replace(x.spec.scale, block=None if scale is None else specs.TOKEN)
    scale = qarray.QArray(flat(codes), flat(scale), None, spec)
    return qarray.QArray(flat(x.codes), scale, None, dataclasses.replace(x.spec, scale=spec))
  decoded = lambda a: flat(qarray.decode(a))
  return dataclasses.replace(x, codes=flat(x.codes), scale=decoded(x.scale), zero=decoded(x.zero))


def _described(a):
  spec = f' on {a.spec}' if hasattr(a, 'spec') else f' of {a.dtype}'
  return f'{tuple(a.shape)}{spec}'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_only(run, x, w):
  return run(x, w)


def _backward(run, w, dy):
  """dx = dy w^T. Codes have no gradient."""
  del run
  return matmul_xla.transposed(dy, decode(w, dy.dtype)), None


_weight_only.defvjp(lambda run, x, w: (run(x, w), w), _backward)
