import re

import numpy as np
import pytest
import tokenizers

from qat.run import union
from tests import offline

pytestmark = pytest.mark.usefixtures('text_is_there')


@pytest.fixture(scope='module')
def text_is_there():
  with offline.skips():
    union.addresses()


@pytest.fixture(scope='module')
def words():
  """A tokenizer whose tokens are the numbers of words in order of first use in 2021; others are 0."""
  text = union.addresses()[-1].text
  vocabulary = {word: i + 1 for i, word in enumerate(dict.fromkeys(re.findall(r'\w+', text)))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({'?': 0} | vocabulary, '?'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'\W+'), 'removed')
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing('? $A', special_tokens=[('?', 0)])
  return tokenizer


def test_all_addresses_are_there_in_order_of_time():
  there = union.addresses()
  assert len(there) == 233
  assert [a.year for a in there] == sorted(a.year for a in there)
  assert (there[0].year, there[0].president, there[0].party) == (1790, 'george washington', 'n')
  assert [a.president for a in there if a.year in (1953, 1961)] == [
      'harry s truman', 'dwight d eisenhower', 'dwight d eisenhower', 'john f kennedy']
  assert there[-1].text.startswith('Thank you. (Applause.) Thank you.')


def test_evaluation_is_the_beginning_of_2021_and_nothing_is_put_before_it(words):
  tokens = union.evaluation(words)
  assert tokens.shape == (4, 512) and tokens.dtype == np.int32
  text = re.findall(r'\w+', union.addresses()[-1].text)[:2048]
  assert [words.id_to_token(t) for t in tokens.ravel()] == text


def test_calibration_is_of_earlier_addresses_without_overlap(words):
  stream = union.tokens(words, range(1990, 2021))
  places = {stream[i:i + 512].tobytes(): i for i in range(0, stream.size, 512)}
  tokens = union.calibration(words)
  assert tokens.shape == (16, 512) and tokens.dtype == np.int32
  assert len({places[row.tobytes()] for row in tokens}) == 16


def test_a_seed_is_a_draw(words):
  a, b, c = (union.calibration(words, seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_years_are_read_in_order_of_time(words):
  both = union.tokens(words, [2021, 2020])
  np.testing.assert_array_equal(both, np.concatenate([union.tokens(words, [2020]), union.tokens(words, [2021])]))


@pytest.mark.parametrize('years', [[1933], [2021, 2022], []])
def test_years_without_an_address(words, years):
  with pytest.raises(ValueError, match=r'there are none of .*Name years of 1790 to 2021'):
    union.tokens(words, years)


@pytest.mark.parametrize('wrong', [dict(count=0), dict(length=1), dict(count=1000)])
def test_more_than_there_is(words, wrong):
  for draw in (union.evaluation, union.calibration):
    with pytest.raises(ValueError, match=r'sequences of \d+ tokens: the addresses chosen have \d+ tokens'):
      draw(words, years=[2021], **wrong)
