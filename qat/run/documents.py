"""Texts of files, in the forms in which corpora are published.

    paths = files('c4/en', 'train')         # c4-train.00000-of-01024.json.gz, ...
    for text in texts(paths[0]): ...        # a str a document

A file of JSON has an object a line, and a Parquet file rows, with a `text` each; any other file is read as a whole or
by its lines, which its corpus knows.
"""

import gzip
import json
import pathlib
import re
import zlib

ROWS = 1024  # Of a Parquet file at a time.


def files(folder, split):
  """The files of a split, sorted: those that have it as a word in their path below `folder`, or none."""
  word = re.compile(rf'(^|[-._/]){re.escape(split)}([-._/]|$)')
  there = (p for p in pathlib.Path(folder).rglob('*') if p.is_file() and kind(p))
  return sorted(p for p in there if word.search(p.relative_to(folder).as_posix()))


def kind(path):
  """What reads a file, by its ending: a value of READERS, or None; hidden files have none."""
  hidden = any(part.startswith('.') for part in path.parts[-3:])  # hf download leaves .cache/ beside the files.
  return None if hidden else next((read for ending, read in READERS.items() if path.name.endswith(ending)), None)


def texts(path):
  """Yields the texts of a file: of each object, of each row, or the whole."""
  return kind(path)(path)


def lines(path):
  """Yields the texts of a file whose rows are lines, and the lines of one that has none, each with its end."""
  found = kind(path)(path)
  return found if kind(path) is not whole else (line for text in found for line in text.splitlines(keepends=True))


def json_lines(path):
  """Of {"text": ...} a line."""
  try:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
      for i, line in enumerate(file, 1):
        if line.strip():
          yield _text(line, f'{path}, line {i}')
  except (EOFError, UnicodeDecodeError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f'{path}: it ends or breaks off ({error}). The download was cut: get it anew.') from error


def _text(line, where):
  try:
    found = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where}: it is no JSON ({error}). Write an object a line.') from error
  if not isinstance(found, dict) or not isinstance(found.get('text'), str):
    raise ValueError(f'{where}: it has no "text"; it begins {line[:60]!r}. Write {{"text": "..."}}.')
  return found['text']


def parquet(path):
  """Of the column `text`."""
  try:
    from pyarrow import lib, parquet
  except ImportError as error:
    raise ValueError(f'{path}: Parquet files are read by pyarrow, which is not installed. Type `pip install pyarrow`, '
                     'or give files of JSON lines.') from error
  try:
    file = parquet.ParquetFile(path)
  except lib.ArrowInvalid as error:
    raise ValueError(f'{path}: it is no Parquet file ({error}). The download was cut: get it anew.') from error
  if 'text' not in file.schema_arrow.names:
    raise ValueError(f'{path}: its columns are {file.schema_arrow.names}, and texts are read from `text`. Rename one.')
  for batch in file.iter_batches(ROWS, columns=['text']):
    yield from batch.column('text').to_pylist()


def whole(path):
  """The one text of a file."""
  try:
    yield path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: it is no text in UTF-8 ({error}). Convert it.') from error


READERS = {'.json.gz': json_lines, '.jsonl.gz': json_lines, '.jsonl': json_lines, '.json': json_lines,
           '.parquet': parquet, '.txt': whole, '.raw': whole, '.tokens': whole}
