"""Low-bit products of other packages, for the tables of benchmarks/kernels.py: tokamax in JAX, PyTorch, bitsandbytes.

Each takes our weight's own codes, so that our definition is its too. tokamax (https://github.com/openxla/tokamax) runs
in the loop that ours run in, with the configuration that it chooses unasked; its time is a ratio to bfloat16 by XLA.
PyTorch and bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes) run on PyTorch's tensors, over
PyTorch's own bfloat16: on CUDA a graph of a product by each weight, replayed between two events, so that no launch from
Python is in it.
"""

import functools
import time

import jax
import jax.numpy as jnp

from benchmarks import products
from qat.core import qarray
from qat.kernels import groups

PACKAGES = ('tokamax', 'torch', 'bitsandbytes')  # A peer's name is its package, and ours.
TORCH_DEVICES = {'gpu': 'cuda', 'cpu': 'cpu'}  # jax's default backend -> PyTorch's device.


def candidates(rows, k, n):
  """name -> Timed of each peer that is right, ready to be timed, and why the others are not there."""
  found, refused = {}, {}
  for name, make in PEERS.items():
    try:
      right, wrong = products.checked({name: make(rows, k, n)})
    except ImportError as why:
      right, wrong = {}, {name: f"{why}: pip install '.[peers]' has it"}
    except Exception as why:  # Of another's package: whatever it raises is why there is no time of it.
      right, wrong = {}, {name: f'{type(why).__name__}: {why}'.splitlines()[0]}
    found |= right
    refused |= wrong
  for name in [name for name, timed in found.items() if timed.base == 'torch bfloat16' and timed.base not in found]:
    refused[name] = f'there is no {found.pop(name).base} to compare it with'
  return found, refused


def _tokamax(name, rows, k, n):
  """ragged_dot with one group. Its kernels read codes [n, k]: held so, they are not turned around at each call."""
  import qwix
  import tokamax
  device = jax.default_backend()
  implementation = 'xla' if device == 'cpu' else 'mosaic'                # No fallback to XLA on a device.

  def hold(q):
    w = groups.of(q)
    return w.codes.T[None], w.scale[None].astype(jnp.bfloat16)

  def product(x, held):
    w = qwix.QArray(held[0].mT, held[1])
    return tokamax.ragged_dot(x, w, jnp.array([rows], jnp.int32), preferred_element_type=x.dtype,
                              implementation=implementation)
  ws = products.weights(k, n, products.WEIGHTS[name])
  return products.Timed(product, products.inputs(rows, k), [jax.jit(hold)(w) for w in ws], ws[0])


class Torch(products.Timed):
  """A product of PyTorch's tensors, which `hold` makes of an array or a QArray."""
  base = 'torch bfloat16'

  def __init__(self, product, hold, spec, shape, most_error=products.MOST_ERROR):
    rows, k, n = shape
    ws = products.weights(k, n, spec)
    super().__init__(product, products.inputs(rows, k), [hold(w) for w in ws], ws[0], most_error)
    self.operand = _tensor(self.x)

  def first(self):
    return jnp.from_dlpack(self._multiply(self.ws[0]).float())

  def timer(self, count):
    import torch
    each = lambda: [self._multiply(w) for w in self.ws] and None
    each()                                                               # Before a graph: libraries start.
    if self.operand.device.type != 'cuda':
      return functools.partial(_wall_seconds, each, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):     # JAX's threads may call CUDA.
      each()
    return functools.partial(_event_seconds, graph.replay, count)

  def weight_bytes(self):
    return sum(t.numel() * t.element_size() for t in self.ws[0])

  def _multiply(self, w):
    import torch
    with torch.inference_mode():
      return self.product(self.operand, *w)


def _wall_seconds(run, count):
  start = time.perf_counter()
  for _ in range(count):
    run()
  return time.perf_counter() - start


def _event_seconds(run, count):
  """Between two events on the device."""
  import torch
  start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  start.record()
  for _ in range(count):
    run()
  end.record()
  end.synchronize()
  return start.elapsed_time(end) / 1e3


def _tensor(a):
  """An array of JAX's as a tensor on PyTorch's device for it; int4 widened to int8."""
  import torch
  device = TORCH_DEVICES.get(jax.default_backend())
  if device is None or device == 'cuda' and not torch.cuda.is_available():
    raise NotImplementedError(f'this PyTorch has no device for {jax.devices()[0].device_kind}')
  a = a.astype(jnp.int8) if a.dtype == jnp.int4 else a
  return torch.from_dlpack(jax.block_until_ready(a)).to(device)


def _torch_bfloat16(*shape):
  import torch
  return Torch(torch.mm, lambda w: (_tensor(w),), None, shape)


def _torch_int4(name, *shape):
  """_weight_int4pack_mm, which reads w = (codes - 8) scale + zero in bfloat16, packed for its device."""
  import torch
  spec = products.WEIGHTS[name]
  group = spec.block[0]

  def hold(q):
    w = groups.of(q)
    codes = _tensor(w.codes.T).int() + 8                                 # [n, k], 0 to 15.
    scale = _tensor(w.scale.astype(jnp.bfloat16))                        # [G, n]
    if codes.device.type == 'cpu':
      packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    else:
      packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    return packed, torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()

  cpu = TORCH_DEVICES.get(jax.default_backend()) == 'cpu'
  multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if cpu else torch._weight_int4pack_mm
  return Torch(lambda x, packed, scales: multiply(x, packed, group, scales), hold, spec, shape)


def _torch_int8(name, *shape):
  """_int_mm, with rows of x rounded to int8 before and scales after."""
  import torch

  def product(x, codes, scale):
    step = x.float().abs().amax(1, keepdim=True) / 127
    rounded = (x / step).round().to(torch.int8)
    return (torch._int_mm(rounded, codes).float() * step * scale).to(x.dtype)

  hold = lambda q: (_tensor(q.codes.T).T, _tensor(qarray.decode(q.scale)))  # Columns are contiguous, as it wants.
  return Torch(product, hold, products.CODES[name][1], shape, products.CODES_ERROR)


def _bitsandbytes(name, *shape):
  """matmul_4bit. Numbers that are on NF4's grid are encoded as they were."""
  from bitsandbytes import functional
  import bitsandbytes
  import torch
  spec, (_, k, n) = products.WEIGHTS[name], shape
  size = spec.block.size

  def hold(q):
    rows = _tensor(qarray.decode(q).T).contiguous()                      # [n, k]
    packed, state = functional.quantize_4bit(rows, blocksize=size, quant_type='nf4')
    return packed, state.absmax, state.code

  def product(x, packed, absmax, code):
    state = functional.QuantState(absmax, torch.Size((n, k)), code, size, 'nf4', torch.bfloat16)
    return bitsandbytes.matmul_4bit(x, packed, state)
  return Torch(product, hold, spec, shape)


PEERS = {
    'torch bfloat16': _torch_bfloat16,
    'torch int4 g128': functools.partial(_torch_int4, 'int4 g128'),
    'torch W8A8': functools.partial(_torch_int8, 'W8A8'),
    'tokamax int4 g128': functools.partial(_tokamax, 'int4 g128'),
    'tokamax int8': functools.partial(_tokamax, 'int8'),
    'bitsandbytes NF4 g64': functools.partial(_bitsandbytes, 'NF4 g64')}
