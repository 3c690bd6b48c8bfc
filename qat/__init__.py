"""Quantization-aware training in JAX and Flax: what you train is what you ship."""

from qat.core import codebooks, formats, observers, ranges, rounding, specs
from qat.core.blocks import Flat
from qat.core.qarray import Min, QArray, Spec, Zero, decode, encode, fake
from qat.models.generate import generate
from qat.nn import recipes
from qat.nn.batch_norm import fold_batch_norm, reestimate_batch_norm
from qat.nn.calibrate import calibrate
from qat.nn.explain import explain
from qat.nn.lora import LoRA, lora
from qat.nn.prepare import prepare
from qat.nn.rules import Rule
from qat.nn.transform import freeze, quantize
