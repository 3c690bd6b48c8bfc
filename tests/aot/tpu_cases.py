"""Products to compile for TPUs: each function returns (function, shapes of its arguments)."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

import qat
from qat.core import formats, qarray, specs
from qat.kernels import attention_tpu, encode_tpu, hadamard_tpu, matmul_tpu, prepared, tokens
from qat.quantizers import ste

K = N = 4096
WEIGHTS = {
    'int4_g128': specs.integer(4, (128, 1)), 'int4_g32': specs.integer(4, (32, 1)), 'int4': specs.integer(4, (None, 1)),
    'int8': specs.integer(8, (None, 1)), 'uint4_g128': specs.affine(4, (128, 1)), 'nf4': specs.kernel(specs.NF4),
    'mxfp4': specs.kernel(specs.MXFP4), 'fp8': qarray.Spec(formats.FP8_E4M3, (None, 1)),
    'int2_g128': specs.integer(2, (128, 1)), 'uint2_g128': specs.affine(2, (128, 1))}
INPUTS = {'bf16': None, 'int8': specs.integer(8, specs.TOKEN), 'fp8': qarray.Spec(formats.FP8_E4M3, specs.TOKEN)}


def shapes(f, *shape):
  return jax.eval_shape(f, jax.ShapeDtypeStruct(shape, jnp.float32))


def product(weight, input, rows):
  """A product of `rows` with a weight prepared for TPUs."""
  w = shapes(lambda w: matmul_tpu.prepare(qarray.encode(w, WEIGHTS[weight])), K, N)
  if (spec := INPUTS[input]) is None:
    return matmul_tpu.matmul, (jax.ShapeDtypeStruct((rows, K), jnp.bfloat16), w)
  return matmul_tpu.matmul, (shapes(lambda x: qarray.encode(x, spec), rows, K), w)


def float_product(rows):
  """The same of bfloat16, by a kernel of the same structure."""
  spec = qarray.Spec(formats.BF16, None)
  w = shapes(lambda w: prepared.Prepared(
      {'codes': w.astype(jnp.bfloat16), 'scale': jnp.ones((1, N))}, spec, w.shape, matmul_tpu.LAYOUT), K, N)
  return matmul_tpu.matmul, (jax.ShapeDtypeStruct((rows, K), jnp.bfloat16), w)


def mxfp4_as_it_is():
  """Which tpu7x alone loads."""
  w = shapes(lambda w: matmul_tpu.prepare(qarray.encode(w, WEIGHTS['mxfp4']), fp4=True), K, N)
  return matmul_tpu.matmul, (jax.ShapeDtypeStruct((16, K), jnp.bfloat16), w)


def rotation():
  return hadamard_tpu.transform, (jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16),)


def encoding():
  spec = specs.integer(8, specs.TOKEN)
  return lambda x: encode_tpu.encode(x, spec), (jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16),)


def attention(format=formats.INT8, zero=None):
  cache = shapes(lambda x: tokens.of(qarray.encode(x, qarray.Spec(format, specs.TOKEN, zero=zero))), 8, 4096, 128)
  query = jax.ShapeDtypeStruct((8, 4, 128), jnp.bfloat16)
  return attention_tpu.decode, (query, cache, cache, jax.ShapeDtypeStruct((), jnp.int32))


attention_kv8, attention_kv4 = (functools.partial(attention, f, qarray.Zero(f)) for f in (formats.UINT8, formats.UINT4))


def unaligned():
  """100 outputs a tile, which no chip takes: what is rejected, and how."""
  w = shapes(lambda w: matmul_tpu.prepare(qarray.encode(w, WEIGHTS['int4_g128'])), K, N)
  tiles = matmul_tpu.Tiles(16, 100, 1024)
  return functools.partial(matmul_tpu.matmul, tiles=tiles), (jax.ShapeDtypeStruct((16, K), jnp.bfloat16), w)


def frozen_layer(ready=lambda model: qat.prepare(model, 'tpu')):
  """A frozen layer as a model calls it, prepared if `ready` does that."""
  layer = nnx.Linear(K, N, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0))
  rule = qat.Rule('.*', ste.STE(WEIGHTS['int4_g128']))
  graph, state = nnx.split(ready(qat.freeze(qat.quantize(layer, [rule]))))
  return lambda state, x: nnx.merge(graph, state)(x), (state, jax.ShapeDtypeStruct((16, K), jnp.bfloat16))


def __getattr__(name):
  """`nf4_x_bf16_16`: product('nf4', 'bf16', 16); `float_16`: float_product(16)."""
  if name.startswith('float_'):
    return functools.partial(float_product, int(name.split('_')[1]))
  if '_x_' not in name:
    raise AttributeError(name)
  weight, rest = name.split('_x_')
  input, rows = rest.rsplit('_', 1)
  return functools.partial(product, weight, input, int(rows))
