from flax import nnx
import numpy as np
import pytest
import tokenizers

from qat.evals import retrieval
from qat.models import encoder
from qat.run import published, sentences, verses
from tests import offline


@pytest.fixture(scope='module')
def words():
  """A tokenizer of single words, set to cut at 3 and fill up to 5 by token 9."""
  vocabulary = {word: i for i, word in enumerate('? a b c d e f g h pad'.split())}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, '?'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(length=5, pad_id=9, pad_token='pad')
  return tokenizer


@pytest.fixture(scope='module')
def minilm():
  with offline.skips():
    return published.load('minilm')


def test_tokens_are_filled_and_cut(words):
  tokens, mask = sentences.encode(words, ['a b', 'c d e f g', ''], length=4)
  assert tokens.dtype == np.int32 and mask.dtype == bool
  np.testing.assert_array_equal(tokens, [[1, 2, 9, 9], [3, 4, 5, 6], [9, 9, 9, 9]])
  np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
  assert sentences.encode(words, ['a b'])[0].shape == (1, 16)
  assert words.truncation['max_length'] == 3 and words.padding['length'] == 5  # As they were.


def test_embeddings_do_not_depend_on_their_batch(words):
  config = encoder.Config(vocab_size=10, context_length=32, width=8, layers=1, heads=2, ffn_width=16)
  model = encoder.Encoder(config, nnx.Rngs(0))
  texts = ['a b c', 'd', 'a ' * 20, 'h g f e', 'b']
  y = sentences.embed(model, words, texts, length=32, batch=2)
  alone = np.concatenate([sentences.embed(model, words, [text], length=32, batch=2) for text in texts])
  np.testing.assert_allclose(y, alone, atol=1e-5)
  tokens, mask = sentences.encode(words, texts, 32)
  np.testing.assert_allclose(y, encoder.pool(model(tokens, mask), mask), atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, rtol=1e-5)


def test_a_sentence_alone_is_no_list(words):
  with pytest.raises(ValueError, match="encode was given 'a b': it takes a list of at least one sentence"):
    sentences.encode(words, 'a b')
  with pytest.raises(ValueError, match=r'encode was given \[\]'):
    sentences.encode(words, [])


def test_the_published_network_finds_meaning_alike(minilm):
  a, b = sentences.embed(minilm.model, minilm.tokenizer, ['A man is eating food.', 'A man is eating a piece of bread.'],
                         batch=2)
  assert round(float(a @ b), 3) == 0.755


@pytest.mark.slow
def test_the_published_network_finds_verses(minilm):
  kjv, web = (sentences.embed(minilm.model, minilm.tokenizer, texts) for texts in verses.pairs(count=900))
  found = retrieval.ranks(kjv, web)
  assert round(retrieval.recall(found, 1).value, 3) == 0.943
  assert round(retrieval.mrr(found).value, 3) == 0.958
