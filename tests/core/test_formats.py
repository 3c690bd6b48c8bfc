"""Every format against an independent implementation: ml_dtypes for floats, numpy for the rest."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qat.core import codebooks, formats, rounding

FLOATS = dict(
    FP16=(formats.FP16, np.float16), BF16=(formats.BF16, ml_dtypes.bfloat16),
    FP8_E4M3=(formats.FP8_E4M3, ml_dtypes.float8_e4m3fn),
    FP8_E5M2=(formats.FP8_E5M2, ml_dtypes.float8_e5m2),
    FP6_E2M3=(formats.FP6_E2M3, ml_dtypes.float6_e2m3fn),
    FP6_E3M2=(formats.FP6_E3M2, ml_dtypes.float6_e3m2fn),
    FP4_E2M1=(formats.FP4_E2M1, ml_dtypes.float4_e2m1fn),
    # Minifloats of our own making, on types of ml_dtypes with codes for infinity.
    FP8_E3M4=(formats.Float(3, 4, largest=15.5), ml_dtypes.float8_e3m4),
    FP8_E4M3_IEEE=(formats.Float(4, 3, largest=240.0), ml_dtypes.float8_e4m3))
INTEGERS = {str(f): f for f in (
    *(formats.Int(b) for b in range(1, 9)), *(formats.Int(b, signed=False) for b in range(1, 9)),
    *(formats.Int(b, narrow=True) for b in range(2, 9)), formats.TERNARY)}
CODEBOOKS = {str(c): c for c in (
    codebooks.NF4, codebooks.NF3, codebooks.NF2, codebooks.FP4_BNB, codebooks.IQ4_NL, codebooks.DYNAMIC8,
    codebooks.DYNAMIC8_UNSIGNED, codebooks.power_of_two(4), codebooks.power_of_two(8, lowest=-15))}
ALL = {**{n: f for n, (f, _) in FLOATS.items()}, **INTEGERS, **CODEBOOKS,
       'E8M0': formats.E8M0, 'BINARY': formats.BINARY, 'FP4_E3M0': formats.FP4_E3M0,
       'FP5_E2M2': formats.Float(2, 2), 'FP2_E1M0': formats.Float(1, 0)}
LARGEST = np.finfo(np.float32).max


def hard_numbers(levels):
  """The levels, all ties between them, their f32 neighbours, and numbers beyond both ends."""
  levels = np.asarray(levels, np.float64)
  points = np.float32(np.concatenate([levels, (levels[1:] + levels[:-1]) / 2]))
  far = np.float32(np.minimum(np.array([1.06, 2.0]) * np.abs(levels).max(), LARGEST))
  x = np.concatenate([points, np.nextafter(points, np.float32(-LARGEST)),
                      np.nextafter(points, LARGEST), far, -far, [LARGEST, -LARGEST]], dtype=np.float32)
  # XLA flushes f32's own subnormals to zero.
  return x[(np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0)]


@pytest.mark.parametrize('name', FLOATS)
def test_rounds_and_encodes_as_ml_dtypes(name):
  format, dtype = FLOATS[name]
  x = hard_numbers(format.levels())
  with np.errstate(over='ignore'):
    want = x.astype(dtype).astype(np.float32)
  want = np.where(np.isfinite(want), want, np.sign(x) * np.float32(format.max))      # We saturate.
  value, codes = jax.jit(lambda x: (format.round(x), format.encode(x)))(x)
  np.testing.assert_array_equal(np.asarray(value).view(np.int32), want.view(np.int32))   # -0 as well
  word = np.uint16 if format.bits == 16 else np.uint8
  np.testing.assert_array_equal(np.asarray(codes).view(word), want.astype(dtype).view(word))


@pytest.mark.parametrize('name', FLOATS)
def test_decodes_every_code_as_ml_dtypes(name):
  format, dtype = FLOATS[name]
  bits = np.arange(2**format.bits).astype(np.uint16 if format.bits == 16 else np.uint8)
  want = bits.view(dtype).astype(np.float32)
  keep = np.isfinite(want) & ((np.abs(want) >= np.finfo(np.float32).tiny) | (want == 0))
  codes = bits if format.dtype is None else bits.view(format.dtype)
  value, again = jax.jit(lambda c: (format.decode(c), format.encode(format.decode(c))))(codes)
  np.testing.assert_array_equal(np.asarray(value)[keep], want[keep])
  np.testing.assert_array_equal(np.asarray(again).view(bits.dtype)[keep], bits[keep])
  assert set(format.levels()) == set(want[np.isfinite(want)].tolist())


def test_exponents_round_as_ml_dtypes():
  x = hard_numbers([2.0**k for k in range(-126, 128)])
  x = x[(x >= 2.0**-126) & (x <= 2.0**127)]
  want = x.astype(ml_dtypes.float8_e8m0fnu)
  got, value = jax.jit(lambda x: (formats.E8M0.encode(x), formats.E8M0.round(x)))(x)
  np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))
  np.testing.assert_array_equal(value, want.astype(np.float32))


@pytest.mark.parametrize('rule', ['ceil', 'floor'])
def test_exponents_round_up_and_down(rule):
  x = hard_numbers([2.0**k for k in range(-126, 128)])
  x = x[(x >= 2.0**-126) & (x <= 2.0**127)]
  mantissa, exponent = np.frexp(x.astype(np.float64))                    # x = m 2^e, 1/2 <= m < 1
  want = np.where((mantissa == 0.5) | (rule == 'floor'), exponent - 1, exponent)
  got = jax.jit(lambda x: formats.E8M0.round(x, getattr(rounding, rule)))(x)
  np.testing.assert_array_equal(got, np.float32(2.0 ** np.minimum(want, 127)))


def test_exponents_saturate_and_have_no_zero():
  np.testing.assert_array_equal(formats.E8M0.round(np.float32([0, -1, LARGEST])),
                                np.float32([2.0**-126, 2.0**-126, 2.0**127]))


@pytest.mark.parametrize('format', INTEGERS.values(), ids=INTEGERS)
def test_integers_are_numpys(format):
  x = hard_numbers(format.levels())
  codes = np.asarray(jax.jit(format.encode)(x))
  np.testing.assert_array_equal(codes.astype(np.float32), np.clip(np.rint(x), format.min, format.max))
  count = round(2.0**format.bits) - (format.narrow and format.bits != 1.6)
  assert len(format.levels()) == count and format.levels() == tuple(range(int(format.min), int(format.max) + 1))


@pytest.mark.parametrize('book', CODEBOOKS.values(), ids=CODEBOOKS)
def test_codebooks_take_the_nearest_and_the_lower_of_two(book):
  """bitsandbytes compares x with the levels' f32 midpoints."""
  levels = np.asarray(book.levels(), np.float32)
  middles = (levels[1:] + levels[:-1]) / 2
  x = np.concatenate([hard_numbers(levels), middles, np.nextafter(middles, LARGEST)])
  codes, value = jax.jit(lambda x: (book.encode(x), book.round(x)))(x)
  np.testing.assert_array_equal(codes, np.searchsorted(middles, x, side='left'))
  np.testing.assert_array_equal(value, levels[np.asarray(codes)])


def test_binary_is_the_sign_and_zero_is_positive():
  np.testing.assert_array_equal(formats.BINARY.round(np.float32([-3, -0.1, 0, 0.1, 9])), [-1, -1, 1, 1, 1])


@pytest.mark.parametrize('format', ALL.values(), ids=ALL)
def test_promises_of_every_format(format):
  levels = np.asarray(format.levels(), np.float64)
  assert (np.diff(levels) > 0).all() and levels[0] == format.min and levels[-1] == format.max
  assert len(levels) <= 2 ** np.ceil(format.bits)
  x = hard_numbers(levels)

  def run(x):
    codes = format.encode(x)
    value = format.decode(codes)
    return format.round(x), value, codes, format.encode(value)

  rounded, value, codes, again = (np.asarray(a) for a in jax.jit(run)(x))
  np.testing.assert_array_equal(value, rounded)                          # decode(encode(x)) == round(x)
  np.testing.assert_array_equal(again, codes)                            # idempotent
  assert codes.dtype == format.storage and value.dtype == np.float32
  assert set(value.tolist()) <= set(levels.tolist())
  assert value.max() == levels[-1] and value.min() == levels[0]          # saturates, and reaches its ends


@pytest.mark.parametrize('rule', ['floor', 'ceil', 'truncate', 'half_away', 'half_up'])
@pytest.mark.parametrize('name', ['INT4', 'UINT3', 'FP4_E2M1', 'FP6_E3M2', 'FP8_E4M3', 'FP16', 'NF4', 'DYNAMIC8'])
def test_directed_rounding_lands_on_the_right_neighbour(name, rule):
  """Against a search in the list of levels, in f64."""
  format = ALL[name]
  levels = np.asarray(format.levels())
  levels = levels if len(levels) < 300 else levels[np.abs(levels) < 0.002]
  x = hard_numbers(levels)
  x = x[(x >= levels[0]) & (x <= levels[-1])]
  low = np.clip(np.searchsorted(levels, x, side='right') - 1, 0, len(levels) - 2)
  below, above = levels[low], levels[low + 1]
  fraction = (x - below) / (above - below)
  up = dict(floor=fraction == 1, ceil=fraction > 0, truncate=np.where(x < 0, fraction > 0, fraction == 1),
            half_away=np.where(x < 0, fraction > 0.5, fraction >= 0.5), half_up=fraction >= 0.5)[rule]
  if isinstance(format, formats.Codebook):
    # Fractions are taken in f32, and of the level below: neighbours one ulp apart may tie.
    keep = np.abs(fraction - 0.5) > 1e-5 if rule.startswith('half') else np.minimum(fraction, 1 - fraction) > 1e-5
    up = np.where((x < 0) & (rule == 'truncate'), fraction == 1, up)
    x, below, above, up = x[keep], below[keep], above[keep], up[keep]
  got = jax.jit(lambda x: format.round(x, getattr(rounding, rule)))(x)
  np.testing.assert_array_equal(got, np.float32(np.where(up, above, below)))


@pytest.mark.parametrize('name', ['INT4', 'TERNARY', 'BINARY', 'FP4_E2M1', 'FP8_E4M3', 'NF4'])
def test_stochastic_rounding_is_unbiased_on_every_grid(name):
  n = 20000
  format = ALL[name]
  x = np.repeat(np.float32([-0.9, -0.3, 0.07, 0.6]), n).reshape(4, n)
  value = np.asarray(jax.jit(lambda x: format.round(x, rounding.Stochastic(jax.random.key(0))))(x))
  assert all(len(np.unique(row)) <= 2 for row in value)
  five_sigma = 5 * value.std(1) / np.sqrt(n)
  assert (np.abs(value.mean(1) - x[:, 0]) <= five_sigma + 1e-7).all()


BITS = dict(INT8=8, INT4=4, UINT2=2, INT4_NARROW=4, TERNARY=1.6, BINARY=1, FP16=16, BF16=16, FP8_E4M3=8,
            FP6_E2M3=6, FP4_E2M1=4, FP4_E3M0=4, NF4=4, NF3=3, NF2=2, FP4_BNB=4, IQ4_NL=4, DYNAMIC8=8, E8M0=8)


@pytest.mark.parametrize('name', BITS)
def test_bits_are_as_named(name):
  assert ALL[name].bits == BITS[name] and (not hasattr(formats, name) or str(getattr(formats, name)))


def test_formats_that_cannot_be_say_why():
  with pytest.raises(ValueError, match=r'Int\(bits=9\): integers have 1 to 8 bits. Pick'):
    formats.Int(9)
  with pytest.raises(ValueError, match='a narrow grid drops the lowest of 3 or more signed codes'):
    formats.Int(4, signed=False, narrow=True)
  with pytest.raises(ValueError, match='a minifloat has 1 or more exponent bits and 8 bits in all, not 9'):
    formats.Float(4, 4)
  with pytest.raises(ValueError, match='the levels must ascend'):
    formats.Codebook((1.0, 0.0))
  with pytest.raises(ValueError, match='rounded half to even only'):
    formats.BF16.round(jnp.ones(1), rounding.floor)
