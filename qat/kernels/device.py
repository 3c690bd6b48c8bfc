"""Where a kernel runs: on a device that has one, in a program that the compiler does not divide.

XLA divides the program of jax.jit among the devices that its arrays are on after jax has lowered it, and no kernel can
be divided: jax refuses those of GPU and TPU there. Inside jax.shard_map, or on one device, kernels run.
"""

import functools

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

from qat.kernels import pipeline_gpu


def module_for(modules, *operands):
  """The module of this process' default device, if its kernel takes the operands, or None.

  Args:
    modules: {'gpu': module, 'tpu': module}, each with unsupported(*operands). Those of 'gpu' are for Hopper.
  """
  name = jax.default_backend()
  if name not in modules or (name == 'gpu' and pipeline_gpu.needs_hopper(jax.devices()[0])):
    return None
  return None if modules[name].unsupported(*operands) else modules[name]


def undivided(kernel, otherwise, *operands, static=(), always=False):
  """kernel(*operands, *static), or otherwise(*operands, *static) in a program that XLA divides among devices.

  Which, is known when the program is lowered; only that one is traced then. Types are those of `otherwise`: how its
  results vary over the axes of jax.shard_map, which kernels do not say. Differentiate around it.

  Args:
    kernel, otherwise: functions of one result in shapes and dtypes, the same objects at each call.
    operands: pytrees of arrays.
    static: further arguments, which are hashed.
    always: the kernel in divided programs too, which jax may refuse.
  """
  leaves, tree = jax.tree.flatten(operands)
  _, out = _results(otherwise, tree, static, (), tuple(jax.typeof(x) for x in leaves))
  return out.unflatten(_undivided.bind(*leaves, kernel=kernel, otherwise=otherwise, tree=tree, static=static,
                                       always=always, maps=()))


_undivided = core.Primitive('undivided')
_undivided.multiple_results = True


@functools.lru_cache(maxsize=1024)
def _results(f, tree, static, maps, avals):
  """Types of the results, and their tree."""
  program, shapes = jax.make_jaxpr(_mapped(f, tree, static, maps), return_shape=True)(*avals)
  return [aval.strip_weak_type() for aval in program.out_avals], jax.tree.structure(shapes)


def _mapped(f, tree, static, maps):
  """f of the leaves of its operands, under jax.vmap over each of `maps`, the innermost first."""
  call = lambda *leaves: f(*tree.unflatten(leaves), *static)
  for axes in maps:
    call = jax.vmap(call, in_axes=axes)
  return call


@_undivided.def_abstract_eval
def _abstract(*avals, kernel, otherwise, tree, static, always, maps):
  del kernel, always
  return _results(otherwise, tree, static, maps, avals)[0]


@_undivided.def_impl
def _run(*leaves, **params):
  with jax.disable_jit(False):                                           # Which would come back here.
    return _jitted(**params)(*leaves)


@functools.lru_cache(maxsize=1024)
def _jitted(**params):
  return jax.jit(functools.partial(_undivided.bind, **params))


def _lower(ctx, *values, kernel, otherwise, tree, static, always, maps):
  f = kernel if always or not _divides(ctx.module_context.axis_context) else otherwise
  call = _mapped(f, tree, static, maps)
  return mlir.lower_fun(lambda *leaves: jax.tree.leaves(call(*leaves)), multiple_results=True)(ctx, *values)


def _divides(context):
  """Whether XLA divides what is lowered in a context among devices."""
  if isinstance(context, mlir.SPMDAxisContext):
    return set(context.manual_axes) != set(context.mesh.axis_names)
  return isinstance(context, mlir.ShardingContext) and context.num_devices > 1


def _batch(leaves, axes, *, maps, **params):
  out = _undivided.bind(*leaves, maps=(*maps, tuple(axes)), **params)
  return out, [0] * len(out)


mlir.register_lowering(_undivided, _lower)
batching.primitive_batchers[_undivided] = _batch
