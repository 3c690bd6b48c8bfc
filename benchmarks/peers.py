"""The same training step under other frameworks: qwix (JAX) and torchao (PyTorch).

qwix quantizes the very decoder that we do, and its ratio is to our float step. torchao quantizes a PyTorch
decoder of the same shapes, whose own float step is its base.
"""

import time

import numpy as np
import qwix
import torch
import torchao.quantization.qat as tqat
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import TorchAODType

from benchmarks import train_step

WIDTH, LAYERS, HEADS = 256, 4, 4


def trainers():
  """name -> an object with seconds(steps); 'torch float' is torchao's base."""
  return {
      'qwix w8a8': _qwix(weight_qtype='int8', act_qtype='int8'),
      'qwix w4 g64': _qwix(weight_qtype='int4', tile_size=64),
      'torch float': Torch(),
      'torchao w8a8': Torch(_fake('int8', PerAxis(0)), _fake('int8', 'per_token', is_symmetric=False)),
      'torchao w4 g64': Torch(_fake('int4', PerGroup(64)))}


def baseline(name):
  """The row that `name` is a ratio to."""
  return 'torch float' if name.startswith('torch') else 'float'


def _qwix(**rule):
  provider = qwix.QtProvider([qwix.QtRule(module_path='blocks/.*', **rule)])
  model = qwix.quantize_model(train_step.network('float'), provider, train_step.tokens()[:, :-1])
  return train_step.trainer(model)[0]


def _fake(bits, granularity, is_symmetric=True):
  dtype = torch.int8 if bits == 'int8' else TorchAODType.INT4
  return tqat.IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=is_symmetric)


class Block(torch.nn.Module):
  """GPT's block."""

  def __init__(self):
    super().__init__()
    self.n1, self.n2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
    self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
    self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

  def forward(self, x):
    b, t, d = x.shape
    y = self.n1(x)
    q, k, v = (f(y).view(b, t, HEADS, d // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
    return x + self.down(torch.nn.functional.gelu(self.up(self.n2(x)), approximate='tanh'))


class Decoder(torch.nn.Module):
  """The decoder of models/decoder.py in GPT's form, tied head."""

  def __init__(self):
    super().__init__()
    self.embed = torch.nn.Embedding(train_step.VOCABULARY, WIDTH)
    self.position = torch.nn.Embedding(train_step.LENGTH, WIDTH)
    self.blocks = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
    self.norm = torch.nn.LayerNorm(WIDTH)

  def forward(self, tokens):
    x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
    return self.norm(self.blocks(x)) @ self.embed.weight.T


class Torch:
  """Steps of AdamW on a PyTorch decoder, in torchao's fake quantization if there is any."""

  def __init__(self, weight=None, activation=None):
    torch.manual_seed(0)
    self.model = Decoder()
    if weight is not None:
      quantize_(self.model.blocks, tqat.QATConfig(activation_config=activation, weight_config=weight, step='prepare'))
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
    self.tokens = torch.from_numpy(np.asarray(train_step.tokens()).astype(np.int64))

  def step(self):
    logits = self.model(self.tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()

  def seconds(self, steps):
    """Of one step, over `steps`."""
    start = time.perf_counter()
    for _ in range(steps):
      self.step()
    return (time.perf_counter() - start) / steps
