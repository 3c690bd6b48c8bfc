"""Models out of GGUF files, the format of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    file = gguf_file.GGUFFile('model.gguf')       # reads the metadata; the weights stay on disk
    model = file.model()                          # qat.models.decoder.Decoder, parameters in float32
    tokenizer = file.tokenizer()                  # tokenizers.Tokenizer
    logits = model(jnp.array([tokenizer.encode('The capital of France is').ids]))
    file.facts()['base']                          # 'Q4_1 grid'

Tensors are stored [out, in] and become kernels [in, out]; blocks of codes are decoded by the `gguf` package, so a
quantized file gives a float model whose weights lie on that file's grid. Files of llama.cpp order the rows of queries
and keys for rotary positions of neighbours, so the model's are `rope.interleaved`.
"""

import collections
import collections.abc
import pathlib

from flax import nnx
import gguf
import jax.numpy as jnp
import numpy as np

from qat.models import decoder
from qat.models import rope
from qat.models.pretrained import fill
from qat.models.pretrained import tokenizer
from qat.models.pretrained.names import Name, transposed

# https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py, MODEL_TENSORS of LLAMA.
LLAMA = [
    Name('token_embd.weight', 'embed/embedding'),
    Name('output_norm.weight', 'norm/scale'),
    Name('output.weight', 'head/kernel', transposed),
    Name('blk.{i}.attn_norm.weight', 'blocks/{i}/attention_norm/scale'),
    Name('blk.{i}.ffn_norm.weight', 'blocks/{i}/ffn_norm/scale'),
    *(Name(f'blk.{{i}}.attn_{x}.weight', f'blocks/{{i}}/attention/{x}/kernel', transposed) for x in 'qkv'),
    *(Name(f'blk.{{i}}.attn_{x}.bias', f'blocks/{{i}}/attention/{x}/bias') for x in 'qkv'),
    Name('blk.{i}.attn_output.weight', 'blocks/{i}/attention/o/kernel', transposed),
    *(Name(f'blk.{{i}}.ffn_{x}.weight', f'blocks/{{i}}/ffn/{x}/kernel', transposed) for x in ('gate', 'up', 'down')),
]
# What is read when the sizes are, and is no variable: the divisors of rotary angles.
READ_BEFORE = [r'rope_freqs\.weight']

FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


class GGUFFile:
  """A GGUF file: its metadata in memory, its tensors on disk."""

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.reader = _open(self.path)
    self.tensors = Tensors(self.path, self.reader.tensors)

  def metadata(self, key, default=None):
    """The value of a metadata key, or the default."""
    field = self.reader.fields.get(key)
    try:
      return default if field is None else field.contents()
    except UnicodeDecodeError as error:
      raise ValueError(
          f'{self.path}: metadata {key} is no text ({error}). The file is damaged: get it anew.') from error

  def model(self, dtype='float32'):
    """The network that the file holds; its layers compute in `dtype`, its parameters are float32."""
    config = self.shape()
    return fill.fill(
        lambda: decoder.Decoder(config, nnx.Rngs(0), jnp.dtype(dtype)), self.tensors, LLAMA, self.path, READ_BEFORE)

  def shape(self):
    """The decoder.Config of the network."""
    return llama_config(self)

  def tokenizer(self):
    """The tokenizers.Tokenizer that the file describes, or None if it describes none."""
    if self.metadata('tokenizer.ggml.model') is None:
      return None
    return tokenizer.from_gguf(self.metadata, self.path)

  def facts(self):
    """What to print beside numbers that are measured on this model: dict.

    `base` is the grid of most of the weights: rounding to the same grid again costs nothing, and is no result.
    """
    sizes, counts = collections.Counter(), collections.Counter()
    for tensor in self.reader.tensors:
      sizes[tensor.tensor_type.name] += tensor.n_elements
      counts[tensor.tensor_type.name] += 1
    most = max(sizes, key=sizes.get)
    return dict(
        name=self.metadata('general.name', self.path.stem), base=FLOATS.get(most, f'{most} grid'),
        parameters=sum(sizes.values()), tensors=', '.join(f'{n} {kind}' for kind, n in counts.most_common()))


class Tensors(collections.abc.Mapping):
  """The tensors of a file by name: decoded, float32, when they are asked for."""

  def __init__(self, path, tensors):
    self.path = path
    self.tensors = {tensor.name: tensor for tensor in tensors}

  def __getitem__(self, name):
    tensor = self.tensors[name]
    try:
      return gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # [out, in]: GGUF counts axes from the last
    except NotImplementedError as error:
      raise ValueError(
          f'{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, which the gguf package does not decode. '
          'Convert the file to another type.') from error

  def __contains__(self, name):
    return name in self.tensors  # Mapping's own would decode it

  def __iter__(self):
    return iter(self.tensors)

  def __len__(self):
    return len(self.tensors)


def llama_config(file):
  """The decoder.Config in the metadata of a file of architecture llama."""
  architecture = file.metadata('general.architecture')
  if architecture != 'llama':
    raise ValueError(
        f'{file.path}: its architecture is {architecture!r}, and GGUF files are read as llama only. '
        'Give the folder that it was converted from instead.')
  width, heads = _integer(file, 'embedding_length'), _integer(file, 'attention.head_count')
  head_dim = _integer(file, 'attention.key_length', width // max(heads, 1))
  turned = _integer(file, 'rope.dimension_count', head_dim)
  if not heads or turned != head_dim or _integer(file, 'attention.value_length', head_dim) != head_dim:
    raise ValueError(
        f'{file.path}: {heads} heads of {head_dim} features, of which rotary positions turn {turned}. Here all '
        'features are turned, and values are as wide as keys: take another model.')
  return decoder.Config(**(decoder.LLAMA | dict(
      vocab_size=_rows(file, 'token_embd.weight'), context_length=_integer(file, 'context_length'), width=width,
      layers=_integer(file, 'block_count'), heads=heads, head_dim=head_dim,
      kv_heads=_integer(file, 'attention.head_count_kv', heads), ffn_width=_integer(file, 'feed_forward_length'),
      norm_epsilon=file.metadata('llama.attention.layer_norm_rms_epsilon', 1e-5),
      rope=rope.Rope(file.metadata('llama.rope.freq_base', 10000.0), rope.interleaved, _divisors(file)),
      qkv_bias='blk.0.attn_q.bias' in file.tensors, tied_head='output.weight' not in file.tensors)))


def _integer(file, key, default=None):
  """One size of the metadata."""
  value = file.metadata(f'llama.{key}', default)
  if not isinstance(value, int) or value < 0:
    raise ValueError(f'{file.path}: metadata llama.{key} is {value!r}, and should be one size. '
                     'Convert the model anew, or give the folder that it was converted from.')
  return value


def _rows(file, name):
  """The rows of a matrix, without decoding it."""
  if name not in file.tensors or len(file.tensors.tensors[name].shape) != 2:
    raise ValueError(f'{file.path}: it has {len(file.tensors)} tensors, and no matrix {name!r}. '
                     'It is not whole, or holds no language model: get it anew.')
  return int(file.tensors.tensors[name].shape[1])


def _divisors(file):
  """What rotary angles are divided by: a tensor in files of Llama 3.1, a number in those of linear interpolation."""
  if 'rope_freqs.weight' in file.tensors:
    return tuple(file.tensors['rope_freqs.weight'].tolist())
  scaling = file.metadata('llama.rope.scaling.type', 'none')
  if scaling not in ('none', 'linear'):
    raise ValueError(f'{file.path}: rotary positions are scaled by {scaling!r}; the kinds known are none, linear, and '
                     "Llama 3.1's, whose factors are a tensor. Take a model without it.")
  return file.metadata('llama.rope.scaling.factor', 1.0) if scaling == 'linear' else 1.0


class _Reader(gguf.GGUFReader):
  """The gguf package's reader, which reads beyond the end of a file as if nothing were there."""

  def _get(self, offset, dtype, count=1, override_order=None):
    found = np.frombuffer(self.data, dtype, int(count), int(offset))  # raises; and slices of a memmap are slow
    return found.view(found.dtype.newbyteorder(override_order or self.byte_order))


def _open(path):
  """The reader of a whole file."""
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such file. Give the path of a .gguf file.')
  try:
    reader = _Reader(path)
  except (ValueError, IndexError, KeyError, OverflowError, TypeError, RecursionError) as error:
    raise ValueError(
        f'{path}: {path.stat().st_size} bytes that are no whole GGUF file ({error}). It was cut or damaged: delete it, '
        'and get it anew.') from error
  if reader.byte_order != 'I':
    raise ValueError(f"{path}: its bytes are in the other order than this machine's. Convert it on such a machine.")
  return reader
