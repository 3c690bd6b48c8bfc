import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.core import codebooks, formats, packing

LAYOUTS = [packing.LowFirst(8), packing.LowFirst(32), packing.HighFirst(8), packing.HighFirst(32)]
FORMATS = {str(f): f for f in (
    *(formats.Int(b) for b in range(1, 9)), *(formats.Int(b, signed=False) for b in range(1, 9)),
    formats.INT4_NARROW, formats.TERNARY, formats.BINARY, formats.FP8_E4M3, formats.FP8_E5M2, formats.FP6_E2M3,
    formats.FP6_E3M2, formats.FP4_E2M1, formats.FP4_E3M0, formats.Float(2, 2), formats.E8M0, codebooks.NF4,
    codebooks.NF3, codebooks.NF2, codebooks.FP4_BNB, codebooks.IQ4_NL, codebooks.DYNAMIC8, codebooks.DYNAMIC8_UNSIGNED,
    codebooks.power_of_two(4))}


def words_of_bits(fields, bits, width, high_first):
  """By Python's big integers: the stream is one number."""
  if high_first:
    text = ''.join(f'{f:0{bits}b}' for f in fields)
    text += '0' * (-len(text) % width)
    return [int(text[i:i + width], 2) for i in range(0, len(text), width)]
  number = sum(f << (i * bits) for i, f in enumerate(fields))
  return [(number >> i) % 2**width for i in range(0, len(fields) * bits, width)]


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
@pytest.mark.parametrize('bits', range(1, 9))
def test_streams_equal_big_integers(bits, layout):
  fields = np.random.default_rng(bits).integers(0, 2**bits, (2, 37)).astype(np.uint8)
  got = np.asarray(packing.pack(fields, formats.Int(bits, signed=False), layout))
  want = [words_of_bits(row.tolist(), bits, layout.width, isinstance(layout, packing.HighFirst)) for row in fields]
  assert got.dtype == (np.uint8 if layout.width == 8 else np.int32)
  np.testing.assert_array_equal(got.view(f'u{layout.width // 8}'), want)


@pytest.mark.parametrize('layout', [*LAYOUTS, packing.Trits()], ids=str)
def test_round_trips_every_format(layout):
  some = {n: f for n, f in FORMATS.items() if isinstance(f, formats.Ternary) or layout != packing.Trits()}
  x = np.random.default_rng(0).standard_normal((3, 43)).astype(np.float32)
  codes = {n: f.encode(x * 0.7 * f.max if f.max else x) for n, f in some.items()}

  @jax.jit
  def there_and_back(codes):
    words = {n: packing.pack(codes[n], f, layout) for n, f in some.items()}
    return words, {n: packing.unpack(words[n], f, x.shape[-1], layout) for n, f in some.items()}

  words, back = there_and_back(codes)
  for name, format in some.items():
    assert back[name].dtype == codes[name].dtype, name
    np.testing.assert_array_equal(format.decode(back[name]), format.decode(codes[name]), name)
    bits = 8 / 5 if layout == packing.Trits() else np.ceil(format.bits)
    assert words[name].shape[-1] == np.ceil(43 * bits / getattr(layout, 'width', 8)), name


def test_every_byte_of_trits():
  fields = np.stack([np.arange(243) // 3**i % 3 for i in range(5)], -1).astype(np.int8) - 1
  packed = packing.pack(fields, formats.TERNARY, packing.Trits())
  np.testing.assert_array_equal(packed[:, 0], np.arange(243))
  np.testing.assert_array_equal(packing.unpack(packed, formats.TERNARY, 5, packing.Trits()).astype(jnp.int8), fields)


def test_known_words():
  """GPTQ's symmetric 4-bit zeros are 0x88888888; bitsandbytes' first code is in the high nibble."""
  zeros = jnp.zeros(8, jnp.int4)
  assert packing.pack(zeros, formats.INT4, packing.LowFirst(32)).view(jnp.uint32).tolist() == [0x88888888]
  np.testing.assert_array_equal(packing.pack(jnp.array([1, 15], jnp.uint8), codebooks.NF4, packing.HighFirst()), [0x1f])
  # GPTQ's 3 bits: values 10 and 21 straddle words.
  fields = np.zeros(32, np.uint8)
  fields[10] = 7
  np.testing.assert_array_equal(packing.pack(fields, formats.UINT3, packing.LowFirst(32)).view(jnp.uint32),
                                [0b11 << 30, 1, 0])


def test_signed_codes_are_offset():
  codes = jnp.array([-8, -1, 0, 7], jnp.int4)
  np.testing.assert_array_equal(packing.to_fields(codes, formats.INT4), [0, 7, 8, 15])
  np.testing.assert_array_equal(packing.to_fields(jnp.array([-1, 0, 1], jnp.int4), formats.TERNARY), [0, 1, 2])


def test_what_cannot_be_packed_says_why():
  with pytest.raises(ValueError, match='Trits hold ternary codes'):
    packing.pack(jnp.zeros(5, jnp.int8), formats.INT8, packing.Trits())
  with pytest.raises(ValueError, match='codes of at most 8 bits, not 16'):
    packing.pack(jnp.zeros(5, jnp.float16), formats.FP16)
  with pytest.raises(ValueError, match='words have 8 or 32 bits'):
    packing.LowFirst(16)
