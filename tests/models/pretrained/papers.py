"""Forwards written from the papers, in numpy and float64, on tensors under Hugging Face's names."""

import math

import numpy as np

from tests.models.pretrained import hf

FREQUENCIES = 500.0 ** (-np.arange(0, hf.HEAD_DIM, 2) / hf.HEAD_DIM)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def silu(x):
  return x / (1 + np.exp(-x))


def gelu(x):
  """Hendrycks and Gimpel, 2016, Sec. 2: the approximation with tanh."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q, k, v):
  """Causal attention, a head and a position after the other: q [t, h, d], k and v [t, kv, d] -> [t, h d]."""
  t, h, d = q.shape
  out = np.zeros((t, h, d))
  for i in range(t):
    for j in range(h):
      shared = j // (h // k.shape[1])
      weights = softmax(k[:i + 1, shared] @ q[i, j] / math.sqrt(d))
      out[i, j] = weights @ v[:i + 1, shared]
  return out.reshape(t, h * d)


def rotate_halves(x, frequencies):
  """Su et al., Eq. (15), with pairs (i, i + d/2) as complex numbers: x [t, h, d]."""
  half = x.shape[-1] // 2
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
  return np.concatenate([turned.real, turned.imag], -1)


def llama(weights, tokens, frequencies=FREQUENCIES, unit=0.0, act=silu, embed_scale=1.0):
  """One sequence through Llama: float64[t, vocab]; `unit` is added to the norms' scales."""
  w = {name.removeprefix('model.'): x.astype(np.float64) for name, x in weights.items()}
  norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (w[name] + unit)
  linear = lambda x, name: x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0.0)
  x = w['embed_tokens.weight'][tokens] * embed_scale
  for i in range(hf.LAYERS):
    layer = f'layers.{i}'
    y = norm(x, f'{layer}.input_layernorm.weight')
    q, k, v = (linear(y, f'{layer}.self_attn.{n}_proj').reshape(len(tokens), -1, hf.HEAD_DIM) for n in 'qkv')
    if f'{layer}.self_attn.q_norm.weight' in w:
      q, k = norm(q, f'{layer}.self_attn.q_norm.weight'), norm(k, f'{layer}.self_attn.k_norm.weight')
    mixed = attend(rotate_halves(q, frequencies), rotate_halves(k, frequencies), v)
    x = x + linear(mixed, f'{layer}.self_attn.o_proj')
    y = norm(x, f'{layer}.post_attention_layernorm.weight')
    gate, up = (linear(y, f'{layer}.mlp.{n}_proj') for n in ('gate', 'up'))
    x = x + linear(act(gate) * up, f'{layer}.mlp.down_proj')
  return norm(x, 'norm.weight') @ w.get('lm_head.weight', w['embed_tokens.weight']).T


def gpt2(weights, tokens):
  """One sequence through GPT-2: float64[t, vocab]."""
  w = {name.removeprefix('transformer.'): x.astype(np.float64) for name, x in weights.items()}

  def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f'{name}.weight'] + w[f'{name}.bias']

  linear = lambda x, name: x @ w[f'{name}.weight'] + w[f'{name}.bias']
  x = w['wte.weight'][tokens] + w['wpe.weight'][:len(tokens)]
  for i in range(hf.LAYERS):
    q, k, v = np.split(linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn'), 3, axis=-1)
    heads = lambda y: y.reshape(len(tokens), hf.HEADS, -1)
    x = x + linear(attend(heads(q), heads(k), heads(v)), f'h.{i}.attn.c_proj')
    x = x + linear(gelu(linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')), f'h.{i}.mlp.c_proj')
  return norm(x, 'ln_f') @ w['wte.weight'].T


def llama3_frequencies(factor=4.0, low=1.0, high=3.0, context=64):
  """Llama 3.1's angles a token, from wavelengths, as its authors write them."""
  out = []
  for f in FREQUENCIES:
    wavelength = 2 * math.pi / f
    if wavelength < context / high:
      out.append(f)
    elif wavelength > context / low:
      out.append(f / factor)
    else:
      smooth = (context / wavelength - low) / (high - low)
      out.append((1 - smooth) * f / factor + smooth * f)
  return np.array(out)
