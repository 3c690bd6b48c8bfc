import re

import pytest

from qat.run import verses
from tests import offline

MODULE = 'from bible import Bible\nBible(1, """{}""",\n  {{{}}},\n  {{{}}},\n  {{Book.GENESIS: {{1: 31}}}})\n'


@pytest.fixture(scope='module')
def kjv():
  with offline.skips():
    return verses.verses('kjv')


def test_parses_without_running():
  source = 'raise SystemExit\n' + MODULE.format('One.\n  Two “2”.', '1001001: 0, 1001002: 4', '1001001: 4, 1001002: 15')
  assert verses.parse(source) == {1001001: 'One.', 1001002: 'Two “2”.'}


@pytest.mark.parametrize('source, message', [
    ('', 'of 0 characters: it has no text in triple quotes'),
    ('"""a""", {1: 0}', 'that two dicts of offsets follow'),
    (MODULE.format(r'a\n', '1: 0', '1: 2'), 'has escapes, which would move the offsets'),
    (MODULE.format('ab', '1: 0', '2: 2'), 'with 1 starts and 1 ends of verses in 2 characters: they do not fit'),
    (MODULE.format('ab', '1: 0', '1: 3'), 'they do not fit'),
    (MODULE.format('ab', '1: 2', '1: 1'), 'they do not fit')])
def test_other_modules_are_refused(source, message):
  with pytest.raises(ValueError, match=message):
    verses.parse(source)


def test_the_bible_is_whole(kjv):
  assert len(kjv) == 31102
  assert kjv[1001001] == '1. In the beginning God created the heaven and the earth.'
  assert kjv[66022021] == '21. The grace of our Lord Jesus Christ [be] with you all. Amen.'
  readers = verses.verses('web', 'readers')
  assert readers.keys() == verses.verses('web').keys()
  assert kjv.keys() - readers.keys() == {45016025, 45016026, 45016027}  # The end of Romans, 14:24-26 there.
  assert readers[20003005] == "Trust in Yahweh with all your heart, And don`t lean on your own understanding."


def test_pairs_are_of_one_verse(kjv):
  ours, theirs = verses.pairs(count=900)
  assert len(ours) == len(theirs) == 900
  number = lambda text: int(re.match(r'\d+', text)[0])
  assert [number(a) for a in ours] == [number(b) for b in theirs]
  ours, theirs = verses.pairs(verses.PSALMS, edition='readers')
  assert len(ours) == 2461 and ours[0].startswith('Blessed [is] the man') and theirs[0].startswith('Blessed is the man')


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="Version 'niv', edition 'numbered': there are the versions"):
    verses.verses('niv')
  with pytest.raises(ValueError, match="edition 'pocket': there are .* editions .'numbered', 'readers'"):
    verses.verses('kjv', 'pocket')


def test_books_have_numbers(kjv):
  with pytest.raises(ValueError, match='Book 67: the books are numbered 1 to 66. Proverbs is 20'):
    verses.pairs(67)
