"""Grids that have names: the standards, and the file formats' blocks.

They block the last axis, as the standards and files do: rows [out, in]. A kernel [in, out] takes
`kernel(spec)`, the same grid down its columns.
"""

import dataclasses

from qat.core import codebooks, formats
from qat.core.blocks import Flat
from qat.core.qarray import Min, Spec, Zero

F16 = Spec(formats.FP16, None)
E8M0 = Spec(formats.E8M0, None)

# OCP Microscaling Formats (MX) 1.0, 2023, Table 1. Each element of MXINT8 is a fraction of 2.
MXFP8 = Spec(formats.FP8_E4M3, (32,), E8M0)
MXFP8_E5M2 = Spec(formats.FP8_E5M2, (32,), E8M0)
MXFP6 = Spec(formats.FP6_E2M3, (32,), E8M0)
MXFP6_E3M2 = Spec(formats.FP6_E3M2, (32,), E8M0)
MXFP4 = Spec(formats.FP4_E2M1, (32,), E8M0)
MXINT8 = Spec(formats.INT8, (32,), E8M0)
# NVIDIA's: fp8 scales under one float for the tensor.
NVFP4 = Spec(formats.FP4_E2M1, (16,), Spec(formats.FP8_E4M3, (None, None)))

# Dettmers et al. QLoRA, 2023. bitsandbytes reads a matrix row after row, in runs.
NF4 = Spec(codebooks.NF4, Flat(64))
FP4_BNB = Spec(codebooks.FP4_BNB, Flat(64))
NF4_DQ = Spec(codebooks.NF4, Flat(64), Spec(codebooks.DYNAMIC8, Flat(256), zero=Min()))

# GGUF (ggml-quants.c). Scales may be negative.
Q4_0 = Spec(formats.INT4, (32,), F16)
Q4_1 = Spec(formats.UINT4, (32,), F16, Min(F16))
Q5_0 = Spec(formats.INT5, (32,), F16)
Q5_1 = Spec(formats.UINT5, (32,), F16, Min(F16))
Q8_0 = Spec(formats.INT8, (32,), F16)
IQ4_NL = Spec(codebooks.IQ4_NL, (32,), F16)
# 256 numbers share float16s, under which the blocks' scales (and minimums) are integers.
Q2_K = Spec(formats.UINT2, (16,), Spec(formats.UINT4, (16,), F16), Min(Spec(formats.UINT4, (16,), F16)))
Q3_K = Spec(formats.INT3, (16,), Spec(formats.INT6, (16,), F16))
Q4_K = Spec(formats.UINT4, (32,), Spec(formats.UINT6, (8,), F16), Min(Spec(formats.UINT6, (8,), F16)))
Q5_K = Spec(formats.UINT5, (32,), Spec(formats.UINT6, (8,), F16), Min(Spec(formats.UINT6, (8,), F16)))
Q6_K = Spec(formats.INT6, (16,), Spec(formats.INT8, (16,), F16))

TOKEN, TENSOR, CHANNEL = (None,), (...,), (None, 1)


def integer(bits, block, signed=True, narrow=False):
  """A symmetric grid of integers: integer(4, (128, 1)) is the int4 of groups of 128 inputs."""
  return Spec(formats.Int(bits, signed, narrow), block)


def affine(bits, block):
  """An asymmetric grid of unsigned integers with an integer zero point."""
  return Spec(formats.Int(bits, signed=False), block, zero=Zero(formats.Int(bits, signed=False)))


def kernel(spec):
  """The grid of `spec`, which blocks rows [out, in], for a kernel [in, out].

  >>> kernel(MXFP4)
  Spec(FP4_E2M1, (32, 1), scale=Spec(E8M0, None))
  """
  if spec is None or spec.block is None:
    return spec
  if isinstance(spec.block, Flat):
    block = dataclasses.replace(spec.block, columns=True)
  elif spec.block == TENSOR or len(spec.block) == 2:
    block = spec.block[::-1]
  else:
    block = (*spec.block, 1)
  zero = spec.zero
  if isinstance(zero, Min):
    zero = Min(kernel(zero.spec))
  return Spec(spec.format, block, kernel_scale(spec), zero)


def kernel_scale(spec):
  """The scale's own grid under `kernel(spec)`: runs have one axis already."""
  return spec.scale if isinstance(spec.block, Flat) else kernel(spec.scale)
