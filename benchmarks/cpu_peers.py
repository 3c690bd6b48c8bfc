"""PyTorch's products on the CPU: float32, int4 weights in groups of 128, and int8 by int8 with rows rounded."""

import time

import numpy as np
import torch

GROUP = 128


class Product:
  """A product of PyTorch's and its operands."""

  def __init__(self, f, *operands):
    self.f, self.operands = f, operands

  def seconds(self, steps):
    """Of one product, over `steps`."""
    with torch.inference_mode():
      start = time.perf_counter()
      for _ in range(steps):
        self.f(*self.operands)
      return (time.perf_counter() - start) / steps


def products(m, k, n):
  """name -> Product."""
  rng = np.random.default_rng(0)
  x, w = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((m, k), (n, k)))
  found = {'torch float32': Product(torch.nn.functional.linear, x, w),
           'torch W8A8': Product(_int8, x, w.clamp(-1, 1).mul(127).round().to(torch.int8).T, torch.ones(n))}
  if k % GROUP == 0:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(k // GROUP, n, 2, dtype=torch.bfloat16)              # Scale and zero.
    found['torch int4 g128'] = Product(torch.ops.aten._weight_int4pack_mm_for_cpu, x.bfloat16(), packed, GROUP, scales)
  return found


def _int8(x, w, scale):
  """x[m, k] by int8[k, n]: rows rounded to int8, int32 sums, scales after."""
  step = x.abs().amax(1, keepdim=True) / 127
  return torch._int_mm((x / step).round().to(torch.int8), w).float() * step * scale
