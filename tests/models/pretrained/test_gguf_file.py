import ctypes
import pathlib

from flax import nnx
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xllamacpp

from qat.models import rope
from qat.models.pretrained import gguf_file
from tests.models.pretrained import hf
from tests.models.pretrained import papers

Types = gguf.GGMLQuantizationType
TOKENS = np.random.default_rng(1).integers(0, hf.VOCAB, (2, 7))
SIZES = dict(context_length=hf.CONTEXT, embedding_length=hf.WIDTH, block_count=hf.LAYERS, feed_forward_length=hf.FFN,
             head_count=hf.HEADS, head_count_kv=hf.KV, key_length=hf.HEAD_DIM, value_length=hf.HEAD_DIM,
             rope_freq_base=500.0, layer_norm_rms_eps=1e-5)
TIED = {name: x for name, x in hf.tensors(hf.LLAMA).items() if name != 'lm_head.weight'}
NAMES = {'embed_tokens': 'token_embd', 'norm': 'output_norm', 'lm_head': 'output', 'input_layernorm': 'attn_norm',
         'post_attention_layernorm': 'ffn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
         'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate',
         'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}
forward = nnx.jit(lambda model, tokens: model(tokens))


def converted(weights):
  """Tensors of Hugging Face under the names of llama.cpp, which brings the rows that turn together side by side."""
  out = {}
  for name, x in weights.items():
    name, _, kind = name.removeprefix('model.').rpartition('.')
    block = ''
    if name.startswith('layers.'):
      _, i, name = name.split('.', 2)
      block = f'blk.{i}.'
    if name in ('self_attn.q_proj', 'self_attn.k_proj'):  # rows of a head 0, d/2, 1, d/2 + 1, ...
      x = x.reshape(-1, 2, hf.HEAD_DIM // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    out[f'{block}{NAMES[name]}.{kind}'] = np.ascontiguousarray(x)
  return out


def write(path, tensors, sizes=SIZES, architecture='llama', scaling=None):
  """A GGUF file; tensors are arrays, or (bytes, type)."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_name('tiny')
  for key, value in sizes.items():
    getattr(writer, f'add_{key}')(value)
  if scaling:
    writer.add_rope_scaling_type(scaling)
    writer.add_rope_scaling_factor(4.0)
  for name, x in tensors.items():
    if isinstance(x, tuple):
      writer.add_tensor(name, x[0], raw_dtype=x[1])
    else:
      writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'tiny.gguf'


QWEN2_BIAS = {name: x for name, x in hf.tensors(hf.QWEN2).items() if name.endswith('bias')}
DIVISORS = (papers.FREQUENCIES / papers.llama3_frequencies()).astype(np.float32)


@pytest.mark.parametrize('weights, more, scaling, frequencies', [
    (TIED, {}, None, papers.FREQUENCIES),
    (hf.tensors(hf.LLAMA), {}, None, papers.FREQUENCIES),
    (TIED | QWEN2_BIAS, {}, None, papers.FREQUENCIES),
    (TIED, {'rope_freqs.weight': DIVISORS}, None, papers.llama3_frequencies()),
    (TIED, {}, gguf.RopeScalingType.LINEAR, papers.FREQUENCIES / 4),
], ids=['tied', 'head', 'bias', 'llama3', 'linear'])
def test_logits_are_those_of_the_paper(weights, more, scaling, frequencies, path):
  model = gguf_file.GGUFFile(write(path, converted(weights) | more, scaling=scaling)).model()
  expected = np.stack([papers.llama(weights, tokens, frequencies) for tokens in TOKENS])
  np.testing.assert_allclose(forward(model, jnp.asarray(TOKENS)), expected, atol=2e-5 * np.abs(expected).max())


# A network of one layer whose rows are whole blocks of 256.
WIDE = dict(context_length=16, embedding_length=256, block_count=1, feed_forward_length=512, head_count=4)
SHAPES = dict(attn_q=(256, 256), attn_k=(256, 256), attn_v=(256, 256), attn_output=(256, 256),
              ffn_gate=(512, 256), ffn_up=(512, 256), ffn_down=(256, 512))


def wide(kind, data):
  """The tensors of WIDE, whose ffn_down is of one type."""
  plain = {f'blk.0.{name}.weight': np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
  norms = {name: np.ones(256, np.float32) for name in (
      'output_norm.weight', 'blk.0.attn_norm.weight', 'blk.0.ffn_norm.weight')}
  embed = {'token_embd.weight': np.zeros((8, 256), np.float32)}
  return plain | norms | embed | {'blk.0.ffn_down.weight': (data, kind)}


@pytest.fixture(scope='module')
def ggml_c():
  return ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob('*.so'))))


def pointer(a):
  return a.ctypes.data_as(ctypes.c_void_p)


CODED = [kind for kind in Types if kind in gguf.quants._type_traits and kind != Types.BF16]
# llama.cpp prepares seconds for these; all bytes are codes, but for those of a float16: (where, the bits to keep, the
# bits to set) make it 0.1, or in IQ1_M, where it is spread over the block, less than 0.016.
SLOW = {kind: (slice(2), 0, np.array([0.1], np.float16).view(np.uint8))
        for kind in (Types.IQ1_S, Types.IQ2_XXS, Types.IQ2_XS, Types.IQ2_S)} | {Types.IQ1_M: (-1, 0x0F, 0x20)}


def blocks(ggml_c, kind):
  """Eight rows of 512 numbers, in the blocks of a type: u8[8, n]."""
  rng = np.random.default_rng(0)
  block, size = gguf.GGML_QUANT_SIZES[kind]
  data = rng.integers(0, 256, (8, 512 // block, size), np.uint8)
  if kind in SLOW:
    where, keep, bits = SLOW[kind]
    data[..., where] = data[..., where] & keep | bits
    return data.reshape(8, -1)
  x = rng.normal(size=(8, 512)).astype(np.float32)
  ggml_c.ggml_quantize_chunk.restype = ctypes.c_size_t
  ggml_c.ggml_quantize_init(int(kind))
  wrote = ggml_c.ggml_quantize_chunk(int(kind), pointer(x), pointer(data), ctypes.c_int64(0), ctypes.c_int64(8),
                                     ctypes.c_int64(512), pointer(np.ones(512, np.float32)))
  assert wrote == data.size
  return data.reshape(8, -1)


@pytest.mark.parametrize('kind', CODED, ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_llama_cpp_decodes_it(kind, ggml_c, path):
  data, expected = blocks(ggml_c, kind), np.zeros((8, 512), np.float32)
  name = kind.name.lower()
  decode = getattr(ggml_c, f'dequantize_row_{name[:-2] + "_K" if name.endswith("_k") else name}')
  decode(pointer(data), pointer(expected), ctypes.c_int64(expected.size))
  assert np.isfinite(expected).all() and expected.std() > 0.01
  file = gguf_file.GGUFFile(write(path, wide(kind, np.tile(data, (32, 1))), WIDE))
  kernel = file.model().blocks[0].ffn.down.kernel[...]
  assert kernel.shape == (512, 256) and kernel.dtype == jnp.float32
  np.testing.assert_array_equal(kernel, np.tile(expected.T, 32))


def test_bfloat16_is_read_without_loss(path):
  x = np.random.default_rng(0).normal(size=(256, 512)).astype(ml_dtypes.bfloat16)
  file = gguf_file.GGUFFile(write(path, wide(Types.BF16, x.view(np.uint8)), WIDE))
  np.testing.assert_array_equal(file.model().blocks[0].ffn.down.kernel[...], x.astype(np.float32).T)


def test_facts_name_the_grid_of_most_weights(path):
  tensors = wide(None, None)
  kinds = {'blk.0.ffn_down.weight': Types.Q8_0, 'blk.0.ffn_up.weight': Types.Q4_0, 'blk.0.ffn_gate.weight': Types.Q4_0,
           'blk.0.attn_q.weight': Types.Q4_0, 'blk.0.attn_k.weight': Types.Q4_0}
  for name, kind in kinds.items():
    shape = SHAPES[name.split('.')[2]]
    tensors[name] = gguf.quants.quantize(np.ones(shape, np.float32), kind), kind
  facts = gguf_file.GGUFFile(write(path, tensors, WIDE)).facts()
  assert facts == dict(name='tiny', base='Q4_0 grid', parameters=4 * 256**2 + 3 * 512 * 256 + 3 * 256 + 8 * 256,
                       tensors='4 Q4_0, 4 F32, 2 F16, 1 Q8_0')


def test_layers_compute_in_the_dtype_asked_for(path):
  model = gguf_file.GGUFFile(write(path, converted(TIED))).model('bfloat16')
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
  assert nnx.eval_shape(lambda m: m(jnp.asarray(TOKENS)), model).dtype == jnp.bfloat16
  assert model.config.rope.turn is rope.interleaved


def test_arrays_are_the_model_s_own(path):
  """Not views of the file; and a step of training may give them up to the next."""
  tensors = converted(TIED)
  model = gguf_file.GGUFFile(write(path, tensors)).model()
  path.write_bytes(bytes(path.stat().st_size))
  np.testing.assert_array_equal(model.embed.embedding[...], tensors['token_embd.weight'])
  np.testing.assert_array_equal(model.norm.scale[...], tensors['output_norm.weight'])
  params = nnx.state(model)
  jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params))


@pytest.mark.parametrize('length', [0, 3, 20, 100, 1000, 5000, -1000])
def test_a_file_that_was_cut(length, path):
  whole = write(path, converted(TIED)).read_bytes()
  path.write_bytes(whole[:length])
  with pytest.raises(ValueError, match=r'tiny.gguf: \d+ bytes that are no whole GGUF file .*get it anew'):
    gguf_file.GGUFFile(path)


def test_files_of_something_else(path):
  path.write_bytes(b'PK\x03\x04' + bytes(5000))
  with pytest.raises(ValueError, match='no whole GGUF file .*magic'):
    gguf_file.GGUFFile(path)
  path.unlink()
  with pytest.raises(FileNotFoundError, match='there is no such file. Give the path of a .gguf file'):
    gguf_file.GGUFFile(path)


def test_bytes_in_the_other_order(path):
  writer = gguf.GGUFWriter(path, 'llama', endianess=gguf.GGUFEndian.BIG)
  writer.add_tensor('x', np.ones(4, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match='its bytes are in the other order'):
    gguf_file.GGUFFile(path)


@pytest.mark.parametrize('change, message', [
    ({'blk.1.attn_k.weight': None},
     r"1 of 20 variables have no tensor, the first 'blocks/1/attention/k/kernel', which should be 'blk.1.attn_k.wei"),
    ({'token_embd.weight': None}, "it has 19 tensors, and no matrix 'token_embd.weight'"),
    ({'blk.1.attn_q_norm.weight': np.ones(8, np.float32)}, r"no place in the model, the first \['blk.1.attn_q_norm"),
    ({'blk.0.ffn_up.weight': np.ones((16, 24), np.float32)},
     r"'blk.0.ffn_up.weight' has shape \(16, 24\), which becomes \(24, 16\): blocks/0/ffn/up/kernel has shape \(16,"),
    ({'blk.0.ffn_up.weight': np.ones((24, 16), np.int8)}, "ffn_up.weight' is of type I8, which the gguf package does"),
    ({'rope_freqs.weight': np.ones(3, np.float32)}, 'Rope.divisors of 3 numbers'),
])
def test_tensors_that_do_not_fit(change, message, path):
  tensors = {name: x for name, x in (converted(TIED) | change).items() if x is not None}
  with pytest.raises(ValueError, match=message):
    forward(gguf_file.GGUFFile(write(path, tensors)).model(), TOKENS)


@pytest.mark.parametrize('change, message', [
    (dict(architecture='mamba'), "its architecture is 'mamba', and GGUF files are read as llama only"),
    (dict(sizes=SIZES | dict(head_count=[4, 4])), r'llama.attention.head_count is \[4, 4\], and should be one size'),
    (dict(sizes={k: v for k, v in SIZES.items() if k != 'block_count'}), 'llama.block_count is None, and should'),
    (dict(sizes=SIZES | dict(head_count=0)), '0 heads of'),
    (dict(sizes=SIZES | dict(rope_dimension_count=4)), '4 heads of 8 features, of which rotary positions turn 4'),
    (dict(sizes=SIZES | dict(block_count=1)), r"no place in the model, the first \['blk.1"),
    (dict(scaling=gguf.RopeScalingType.YARN), "scaled by 'yarn'; the kinds known are none, linear"),
])
def test_metadata_of_something_else(change, message, path):
  with pytest.raises(ValueError, match=message):
    gguf_file.GGUFFile(write(path, converted(TIED), **change)).model()


def test_damaged_metadata(path):
  whole = write(path, converted(TIED)).read_bytes()
  assert whole.count(b'tiny') == 1
  path.write_bytes(whole.replace(b'tiny', b't\xffny'))
  with pytest.raises(ValueError, match='tiny.gguf: metadata general.name is no text'):
    gguf_file.GGUFFile(path).facts()


def test_an_array_longer_than_the_file_ends_at_once(path):
  """Of 2^40 numbers, by its length."""
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_array('numbers', [7, 7, 7])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  length = np.array([3], '<u8').tobytes() + np.array([7, 7, 7], '<i4').tobytes()
  path.write_bytes(path.read_bytes().replace(length, np.array([2**40], '<u8').tobytes() + length[8:]))
  with pytest.raises(ValueError, match='no whole GGUF file'):
    gguf_file.GGUFFile(path)


def test_no_tokenizer_is_none(path):
  assert gguf_file.GGUFFile(write(path, converted(TIED))).tokenizer() is None
