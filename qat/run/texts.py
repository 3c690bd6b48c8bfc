"""Documents to fine-tune on, by name: published texts, and the user's own texts and chats.

    documents = texts.load('union', 'train', reader, first_year=1945, last_year=2020)
    documents = texts.load('file', 'train', reader, train='mine.jsonl', test='held_out.jsonl')

A file of lines of JSON has a document a line, {"text": "..."} or {"messages": [{"role": "user", "content": "..."},
...]}; any other file is one document.
"""

import dataclasses
import inspect
import json
import pathlib

import numpy as np

from qat.run import chat
from qat.run import names
from qat.run import packing
from qat.run import text_sets
from qat.run import union as addresses
from qat.run import verses

JOHN = 43  # Of the 66 books, held out.


@dataclasses.dataclass(frozen=True)
class Reader:
  """Turns texts and chats into Documents. `template` is a chat.Template or None."""
  tokenizer: object
  template: chat.Template | None
  where: str

  def text(self, text):
    """All tokens count."""
    ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    return packing.Document(ids, np.ones(len(ids), bool))

  def messages(self, messages):
    """Only answers count."""
    if self.template is None:
      raise ValueError(f'{self.where} has no chat template, and the data has chats. Take a model that was published '
                       'for chats, or give texts.')
    return chat.document(messages, self.template, self.tokenizer)

  def token(self, text):
    """The number of one token."""
    number = self.tokenizer.token_to_id(text)
    if number is None:
      added = [t.content for t in self.tokenizer.get_added_tokens_decoder().values()]
      raise ValueError(f'data.separator {text!r}: the tokenizer of {self.where} has no such token. Its special tokens '
                       f'are {added[:8]}. Give one of them.')
    return number


def load(name, split, reader, **options):
  """[Document] of a split, 'train' or 'test'."""
  if name not in TEXTS:
    raise ValueError(f'data.name {name!r}: there is none of that name. {names.suggest(name, TEXTS)}')
  known = list(inspect.signature(TEXTS[name]).parameters)[2:]
  if wrong := sorted(set(options) - set(known)):
    raise ValueError(f'data.options {wrong} of {name!r}: those it has are {known}. Leave out the others.')
  return TEXTS[name](split, reader, **options)


def union(split, reader, first_year=1945, last_year=2020):
  """The addresses on the State of the Union of some years; the test is that of 2021 (qat/run/union.py)."""
  years = addresses.EVALUATION_YEARS if split == 'test' else range(first_year, last_year + 1)
  if split != 'test' and set(years) & set(addresses.EVALUATION_YEARS):
    raise ValueError(f'data.options.last_year {last_year}: the address of {addresses.EVALUATION_YEARS[0]} is the test. '
                     'Give an earlier year.')
  found = [reader.text(a.text) for a in addresses.addresses() if a.year in years]
  if not found:
    raise ValueError(f'data.options of union: there are no addresses from {first_year} to {last_year}. Give years from '
                     '1790 to 2020.')
  return found


def king_james(split, reader):
  """The King James Version, a document a chapter; the test is the Gospel of John."""
  chapters = {}
  for number, text in verses.verses('kjv', 'readers').items():
    if (number // 1_000_000 == JOHN) == (split == 'test'):
      chapters.setdefault(number // 1000, []).append(text)
  return [reader.text('\n'.join(chapter)) for chapter in chapters.values()]


def wikitext(split, reader, data_dir=None, variant='wikitext-2-raw-v1'):
  """The articles of WikiText, and its test in one (qat/run/text_sets.py)."""
  shards = text_sets.shards(text_sets.WIKITEXT, split, data_dir, variant)
  return [reader.text(text) for shard in shards for text in shard.texts()]


def file(split, reader, train='', test=''):
  """The user's own file of each split."""
  name = dict(train=train, test=test)[split]
  path = pathlib.Path(name).expanduser()
  if not name or not path.is_file():
    raise ValueError(f'data.options.{split} {name!r}: there is no such file. Give the path of a text, or of lines of '
                     'JSON that ends in .jsonl.')
  try:
    content = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: it is no text in UTF-8 ({error}). Convert it.') from error
  if not content.strip():
    raise ValueError(f'{path}: the file is empty. Give one with text.')
  if path.suffix != '.jsonl':
    return [reader.text(content)]
  return [_line(line, reader, f'{path}, line {i}') for i, line in enumerate(content.splitlines(), 1) if line.strip()]


def _line(line, reader, where):
  """The Document of a line of JSON."""
  try:
    example = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where}: it is no JSON ({error}). Write a document a line.') from error
  if isinstance(example, dict) and isinstance(example.get('text'), str):
    return reader.text(example['text'])
  messages = example.get('messages') if isinstance(example, dict) else None
  if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
    raise ValueError(f'{where}: it has neither "text", a string, nor "messages", a list of objects; it begins '
                     f'{line[:60]!r}. Write one of them.')
  try:
    return reader.messages(messages)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error


TEXTS = dict(union=union, king_james=king_james, wikitext=wikitext, file=file)
