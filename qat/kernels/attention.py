"""Attention over a cache in codes, by the best implementation there is. `attention_xla.decode` is the definition."""

from qat.kernels import attention_gpu, attention_tpu, attention_xla, device

MODULES = {'gpu': attention_gpu, 'tpu': attention_tpu}


def decode(query, keys, values, length):
  """softmax(q k^T / sqrt(d)) v over the first `length` tokens, with the arguments of attention_xla.decode."""
  module = device.module_for(MODULES, query, keys, values)
  if module is None:
    return attention_xla.decode(query, keys, values, length)
  return device.undivided(module.decode, attention_xla.decode, query, keys, values, length)
