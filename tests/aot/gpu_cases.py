"""Products to compile for GPUs: each name gives a function that returns (function, shapes of its arguments)."""

import functools
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp

import qat
from qat.core import formats, qarray, specs
from qat.kernels import block_scaled as block_scaled_, tokens as tokens_
from qat.kernels import attention_gpu, encode_gpu, hadamard_gpu, matmul_gpu, matmul_xla, scaled_matmul_gpu, tiles_gpu
from qat.nn import recipes

K = N = 4096
WEIGHTS = {
    'int4_g128': specs.integer(4, (128, 1)), 'int4_g32': specs.integer(4, (32, 1)), 'int4': specs.integer(4, (None, 1)),
    'uint4_g128': specs.affine(4, (128, 1)), 'int8': specs.integer(8, (None, 1)), 'nf4': specs.kernel(specs.NF4),
    'mxfp4': specs.kernel(specs.MXFP4), 'nvfp4': specs.kernel(specs.NVFP4),
    'fp8': qarray.Spec(formats.FP8_E4M3, (None, 1))}
BLOCK_SCALED = {'mxfp8': specs.MXFP8, 'nvfp4': specs.NVFP4}
INPUTS = {'int8': specs.integer(8, specs.TOKEN), 'fp8': qarray.Spec(formats.FP8_E4M3, specs.TOKEN)}


def coded(spec, *shape):
  return jax.eval_shape(lambda a: qarray.encode(a, spec), jax.ShapeDtypeStruct(shape, jnp.float32))


def floats(rows):
  return jax.ShapeDtypeStruct((rows, K), jnp.bfloat16)


def weight(name):
  return jax.eval_shape(matmul_gpu.prepare, coded(WEIGHTS[name], K, N))


def tiles(weight_name, rows):
  """The tiles of a product with a weight in codes only."""
  return tiles_gpu.heuristic(rows, weight(weight_name))


def weight_only(name, rows):
  return matmul_gpu.matmul, (floats(rows), weight(name))


def of_codes(name, input, rows):
  w = jax.eval_shape(scaled_matmul_gpu.prepare, coded(WEIGHTS[name], K, N))
  return scaled_matmul_gpu.matmul, (coded(INPUTS[input], rows, K), w)


def xla(name, rows):
  """XLA's form on GPUs, which `best` takes there."""
  x, w = floats(rows), coded(WEIGHTS[name], K, N)
  return matmul_xla.form(x, w), (x, w)


def block_scaled(name, rows):
  """MXFP8 or NVFP4 on both sides, as XLA hands to cuDNN on Blackwell."""
  spec = BLOCK_SCALED[name]
  return block_scaled_.matmul, (coded(spec, rows, K), coded(specs.kernel(spec), K, N))


def prepared(name, rows):
  """The same of a weight that was turned around once."""
  f, (x, w) = block_scaled(name, rows)
  return f, (x, jax.eval_shape(block_scaled_.prepare, w))


def blackwell_layer():
  """A frozen layer of MXFP8 on both sides, as a model that was prepared on Blackwell calls it."""
  layer = nnx.Linear(K, N, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  model = qat.freeze(qat.quantize(layer, recipes.get('mxfp8')))
  with mock.patch.object(block_scaled_, 'available', lambda: True):
    graph, state = nnx.split(qat.prepare(model, 'gpu'))
  return lambda state, x: nnx.merge(graph, state)(x), (state, floats(512))


def batched(rows):
  """Under vmap, over inputs and over weights too."""
  stack = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), tree)
  f = lambda x, p, stacked: (jax.vmap(matmul_gpu.matmul, (0, None))(x, p), jax.vmap(matmul_gpu.matmul)(x, stacked))
  p = weight('int4_g128')
  return f, (stack(floats(rows)), p, stack(p))


def hadamard(n):
  return hadamard_gpu.transform, (jax.ShapeDtypeStruct((512, n), jnp.bfloat16),)


def encode(k, name='int8', encode=encode_gpu.encode):
  return lambda x: encode(x, INPUTS[name]), (jax.ShapeDtypeStruct((512, k), jnp.bfloat16),)


encode_fp8 = functools.partial(encode, name='fp8')
xla_encode = functools.partial(encode, encode=qarray.encode)


def attention(tokens, spec=INPUTS['int8']):
  """8 heads of keys and values, 4 queries each."""
  cache = jax.eval_shape(tokens_.of, coded(spec, 8, tokens, 128))
  query = jax.ShapeDtypeStruct((8, 4, 128), jnp.bfloat16)
  return attention_gpu.decode, (query, cache, cache, jax.ShapeDtypeStruct((), jnp.int32))


attention_kv8, attention_kv4 = (functools.partial(attention, spec=specs.affine(bits, specs.TOKEN)) for bits in (8, 4))


def with_tiles(rows, *sizes):
  """int4 by tiles that do not fit."""
  return lambda x, p: matmul_gpu.matmul(x, p, tiles_gpu.Tiles(*sizes)), (floats(rows), weight('int4_g128'))


too_many_stages = functools.partial(with_tiles, 16, 16, 128, 128, 32, 1)
too_many_registers = functools.partial(with_tiles, 16, 16, 128, 512, 2, 1)


def __getattr__(name):
  """`nf4_16` and `int8_x_int8_16`: by 16 rows; `xla_int4_g128_16`; `batched_16`."""
  what, _, rows = name.rpartition('_')
  if not rows.isdigit():
    raise AttributeError(name)
  if what.startswith('prepared_'):
    return functools.partial(prepared, what.removeprefix('prepared_'), int(rows))
  if what.startswith('block_scaled_'):
    return functools.partial(block_scaled, what.removeprefix('block_scaled_'), int(rows))
  if what in ('batched', 'hadamard', 'encode', 'encode_fp8', 'xla_encode') or what.startswith('attention'):
    return functools.partial(globals()[what], int(rows))
  if what.startswith('xla_'):
    return functools.partial(xla, what.removeprefix('xla_'), int(rows))
  if '_x_' in what:
    return functools.partial(of_codes, *what.split('_x_'), int(rows))
  return functools.partial(weight_only, what, int(rows))
