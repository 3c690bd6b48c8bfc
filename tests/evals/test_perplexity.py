"""Perplexity against hand computation, scikit-learn's log loss, and a loop over windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn import metrics

from qat.evals import perplexity as ppls

VOCABULARY = 7
TABLE = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY)) * 2
STREAM = np.random.default_rng(0).integers(0, VOCABULARY, 40)


@jax.jit
def bigram(tokens):
  """The next token's logits from the last token alone."""
  return TABLE[tokens]


@jax.jit
def counting(tokens):
  """Logits that depend on how long the past is: after k tokens, token k % VOCABULARY is likely."""
  places = jnp.arange(tokens.shape[1]) % VOCABULARY
  return jnp.broadcast_to(jax.nn.one_hot(places, VOCABULARY) * 3, (*tokens.shape, VOCABULARY))


def measured(logits_fn, protocol, stream=STREAM):
  return ppls.perplexity(logits_fn, protocol.cut(stream), protocol)


def test_a_coin_by_hand():
  """p = 3/4 for each of 3 tokens: perplexity 4/3 and no spread."""
  logits_fn = lambda tokens: jnp.broadcast_to(jnp.log(jnp.array([3.0, 1.0])), (*tokens.shape, 2))
  got = measured(logits_fn, ppls.Protocol('zeros', 1, 4, 4), np.zeros(4, np.int32))
  assert (got.count, len(got.losses)) == (3, 3)
  np.testing.assert_allclose([got.ppl, got.nll_sum, got.bits], [4 / 3, 3 * np.log(4 / 3), np.log2(4 / 3)], rtol=1e-6)
  assert got.error < 1e-6


def test_log_loss_of_scikit_learn():
  protocol = ppls.Protocol('random', 5, 8, 8)
  got = measured(bigram, protocol)
  rows = STREAM.reshape(5, 8)
  past, future = rows[:, :-1].ravel(), rows[:, 1:].ravel()
  p = scipy.special.softmax(np.asarray(TABLE, np.float64)[past], axis=-1)
  want = metrics.log_loss(future, p, labels=np.arange(VOCABULARY))
  np.testing.assert_allclose(np.log(got.ppl), want, rtol=1e-6)
  losses = -np.log(p[np.arange(len(past)), future])
  np.testing.assert_allclose(got.error, np.exp(want) * losses.std(ddof=1) / np.sqrt(35), rtol=1e-5)
  assert got.count == protocol.predicted == 35


def test_a_bos_makes_the_first_token_a_target():
  protocol = ppls.Protocol('random', 5, 8, 8, bos=3)
  got = measured(bigram, protocol)
  past = np.concatenate([np.full((5, 1), 3), STREAM.reshape(5, 8)[:, :-1]], axis=1).ravel()
  p = scipy.special.log_softmax(np.asarray(TABLE, np.float64)[past], axis=-1)
  np.testing.assert_allclose(got.losses, -p[np.arange(40), STREAM], rtol=1e-5)
  assert got.count == protocol.predicted == 40


@pytest.mark.parametrize('bos', [None, 0])
@pytest.mark.parametrize('stride', [1, 3, 7, 8])
def test_strides_count_the_last_targets_of_each_window(bos, stride):
  protocol = ppls.Protocol('random', 4, 8, stride, bos=bos)
  got = measured(counting, protocol)
  logits = 3 * np.eye(VOCABULARY)
  want, seen = [], set()
  for start in range(0, 4 * stride, stride):
    for place in range(bos is None, 8):
      # A token is counted in the first window that predicts it; a window cannot predict its first without a bos.
      if start + place not in seen:
        seen.add(start + place)
        past = place - (bos is None)  # Inputs before it in the window, less one: the row of its logits.
        row = scipy.special.log_softmax(logits[past % VOCABULARY])
        want.append(-row[STREAM[start + place]])
  np.testing.assert_allclose(got.losses, want, rtol=1e-5)
  assert len(want) == protocol.predicted


def test_units_divide_the_same_loss():
  decode = lambda tokens: ''.join('ab ü'[t % 4] for t in tokens)
  make = lambda unit: measured(bigram, ppls.Protocol('random', 1, 40, 40, unit=unit))
  tokens, words, octets = make(ppls.TOKEN), make(ppls.word(decode)), make(ppls.byte(decode))
  text = decode(STREAM[1:])
  assert (tokens.count, words.count, octets.count) == (39, len(text.split()), len(text) + text.count('ü'))
  np.testing.assert_allclose(words.ppl, np.exp(tokens.nll_sum / len(text.split())), rtol=1e-12)
  np.testing.assert_allclose(octets.bits * octets.count, tokens.bits * 39, rtol=1e-12)
  assert ppls.word(decode) == ppls.word(str) != ppls.byte(decode)  # Compared by what they count.
  np.testing.assert_allclose(words.error / words.ppl * words.count, tokens.error / tokens.ppl * 39, rtol=1e-12)


def test_the_protocol_is_printed_with_the_number():
  got = str(measured(bigram, ppls.Protocol('digits, test', 2, 8, 4, bos=0)))
  assert got.startswith('perplexity ') and ' +- ' in got
  assert got.endswith('a token, over 12 predicted tokens of digits, test: 2 windows of 8, stride 4, BOS 0')
  assert ppls.Protocol('digits, test', 2, 8, 4, bos=0).plain() == dict(
      text='digits, test', windows=2, window=8, stride=4, bos=0, unit='token', predicted=12)


def test_losses_are_stable_for_large_logits_and_bfloat16():
  logits = jnp.array([[1e4, 1e4, -1e4]])
  np.testing.assert_allclose(ppls.nll(logits, jnp.array([0])), np.log(2), rtol=1e-6)
  rough = jax.random.normal(jax.random.key(1), (3, 500), jnp.bfloat16)
  want = -scipy.special.log_softmax(np.asarray(rough, np.float64), axis=-1)[:, 4]
  np.testing.assert_allclose(ppls.nll(rough, jnp.array([4, 4, 4])), want, rtol=1e-5)


def test_a_perplexity_beyond_float64_is_infinite():
  logits_fn = lambda tokens: jnp.broadcast_to(jnp.array([0.0, 1e4]), (*tokens.shape, 2))
  assert measured(logits_fn, ppls.Protocol('zeros', 1, 4, 4), np.zeros(4, np.int32)).ppl == np.inf


@pytest.mark.parametrize('sizes', [(0, 8, 8), (1, 1, 1), (1, 8, 9), (1, 8, 0)])
def test_sizes_that_predict_nothing_or_skip(sizes):
  with pytest.raises(ValueError, match='Choose other sizes'):
    ppls.Protocol('text', *sizes)


def test_wrong_input():
  protocol = ppls.Protocol('text', 2, 8, 8)
  for tokens in (STREAM[:16], STREAM.reshape(5, 8), STREAM[:16].reshape(2, 8) * 1.0):
    with pytest.raises(ValueError, match='Make them by Protocol.cut'):
      ppls.perplexity(bigram, tokens, protocol)
  with pytest.raises(ValueError, match='reads 16 tokens: the text has shape'):
    protocol.cut(STREAM[:15])
  with pytest.raises(ValueError, match='A token is -100'):
    measured(bigram, protocol, np.full(16, -100))
  with pytest.raises(ValueError, match='window 0 is NaN from predicted token 0'):
    measured(lambda t: bigram(t) * jnp.nan, protocol)
  with pytest.raises(ValueError, match='beyond the vocabulary'):
    measured(lambda t: jnp.zeros((*t.shape, VOCABULARY)), protocol, np.full(16, VOCABULARY))
  with pytest.raises(ValueError, match='it is to return'):
    measured(lambda t: bigram(t)[0], protocol)
  with pytest.raises(ValueError, match='not one word'):
    measured(bigram, ppls.Protocol('text', 2, 8, 8, unit=ppls.word(lambda tokens: '')))
