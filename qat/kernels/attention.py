"""Attention over a cache in codes, by the best implementation there is. `attention_xla.decode` is the definition."""

from qat.kernels import attention_gpu, attention_tpu, attention_xla, device

MODULES = {'gpu': attention_gpu, 'tpu': attention_tpu}


def decode(query, keys, values, length):
  """softmax(q k^T / sqrt(d)) v over the first `length` tokens, with the arguments of attention_xla.decode."""
  return device.module_for(MODULES, attention_xla, query, keys, values).decode(query, keys, values, length)
