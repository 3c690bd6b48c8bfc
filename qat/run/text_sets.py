"""C4 and WikiText as rows of tokens, from prepared TFDS datasets or from the files on Hugging Face's hub.

    c4         a TFDS dataset c4/en; or files such as <data_dir>/en/c4-train.00000-of-01024.json.gz
    wikitext   a TFDS dataset of the variant; or <data_dir>/wikitext-103-raw-v1/train-00000-of-00002.parquet, or the
               wiki.train.raw of the first release

Raffel et al. Exploring the Limits of Transfer Learning, JMLR 2020. https://arxiv.org/abs/1910.10683
Merity et al. Pointer Sentinel Mixture Models, ICLR 2017. https://arxiv.org/abs/1609.07843

Nothing is fetched: an error says what to type. Any folder of .json.gz, .jsonl, .parquet or .txt whose names say
`train`, `validation` or `test` is read as `c4`.
"""

import dataclasses
import functools
import pathlib
import re

from qat.models.pretrained import tokenizer as tokenizers
from qat.run import corpus
from qat.run import documents
from qat.run import names
from qat.run import prepared
from qat.run import published
from qat.run import splits

CHUNK = 1 << 16  # Examples of a TFDS dataset that make a shard.
ARTICLE = re.compile(r' = [^=].* = \n?')  # The heading of an article; those of its sections have more signs.
GET_C4 = ("Type `hf download allenai/c4 --repo-type dataset --include 'en/c4-train.0000*-of-01024.json.gz' --include "
          "'en/c4-validation.*' --local-dir {folder}` (10 of 1,024 files of 320 MB; 'en/*' for all), or prepare it by "
          '`tfds build c4/{variant} --file_format=array_record --data_dir={folder}`')
GET_WIKITEXT = "Type `hf download Salesforce/wikitext --repo-type dataset --include '{variant}/*' --local-dir {folder}`"


@dataclasses.dataclass(frozen=True)
class Set:
  """A corpus.

  Attributes:
    name: in TFDS, and its variant `<name>/<variant>`.
    lines: whether its rows are the lines of documents, and not documents.
    get: how it is fetched.
    endings: the names of its splits in files, if others than TFDS's: {split: names}.
  """
  name: str
  lines: bool
  get: str
  endings: dict = dataclasses.field(default_factory=dict)


C4 = Set('c4', False, GET_C4)
WIKITEXT = Set('wikitext', True, GET_WIKITEXT, dict(validation=('validation', 'valid')))
SETS = dict(c4=C4, wikitext=WIKITEXT)


def c4(split, data_dir=None, tokenizer='', separator='', length=2048, variant='en', files=0):
  """A source of C4: corpus.Corpus.

  Args:
    split: 'train', 'validation', or a slice, which counts documents.
    data_dir: the folder that has it; that of TFDS if None.
    tokenizer: a tokenizer.json or the folder that holds one; or the name of a published network.
    separator: the token after each document, such as '</s>'; '' for none.
    length: inputs a row.
    variant: the folder, or TFDS's config.
    files: how many files are read, the first ones; 0 for all.
  """
  tokenizer = tokenizer_of(tokenizer)
  return rows(tokens(C4, split, data_dir, tokenizer, separator, variant, files), length, tokenizer)


def wikitext(split, data_dir=None, tokenizer='', separator='', length=2048, variant='wikitext-103-raw-v1', files=0):
  """A source of WikiText: corpus.Corpus. Options as above.

  Lines are joined by '\\n\\n', as papers on quantization do. In training a document is an article; the other splits are
  one document, so that wikitext-2-raw-v1 without a separator has the tokens that those papers measure on.
  """
  tokenizer = tokenizer_of(tokenizer)
  return rows(tokens(WIKITEXT, split, data_dir, tokenizer, separator, variant, files), length, tokenizer)


def named(name):
  """The Set of a name."""
  if name not in SETS:
    raise ValueError(f'Corpus {name!r}: there is none of that name. {names.suggest(name, SETS)}')
  return SETS[name]


def rows(parts, length, tokenizer):
  """The Corpus of Tokens."""
  return corpus.Corpus([part.tokens for part in parts], length, tokenizer.get_vocab_size())


def tokens(kind, split, data_dir, tokenizer, separator='', variant='', files=0):
  """[corpus.Tokens] of a split or slices of a Set, a part of a file each."""
  after = token(tokenizer, separator) if separator else None
  found = {name: shards(kind, name, data_dir, variant)[:files or None] for name in splits.names(split)}
  made = {name: [corpus.tokenized(shard, tokenizer, after) for shard in shards] for name, shards in found.items()}
  sizes = {name: sum(len(t.ends) for t in some) for name, some in made.items()}
  parts = []
  for name, first, end in splits.ranges(split, sizes):
    for t in made[name]:
      inside = max(first, 0), min(end, len(t.ends))
      if inside[0] < inside[1]:
        parts.append(t.part(*inside))
      first, end = first - len(t.ends), end - len(t.ends)
  return parts


def shards(kind, split, data_dir, variant):
  """[corpus.Shard] of a split of a Set."""
  for name in (f'{kind.name}/{variant}', kind.name):
    if builder := prepared.found(name, data_dir):
      return _prepared(kind, builder, split)
  root = pathlib.Path(data_dir or prepared.folder()).expanduser()
  folder = root / variant if (root / variant).is_dir() else root
  if folder.is_dir():
    for word in kind.endings.get(split, (split,)):
      if paths := documents.files(folder, word):
        return [_file(kind, path, folder, split) for path in paths]
  there = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else 'nothing'
  raise ValueError(
      f'Dataset {kind.name!r}: {folder} has no files of a split {split!r} that end in {list(documents.READERS)}; there '
      f'is {there}. {kind.get.format(folder=root, variant=variant)}. Give the folder as --config.data.data_dir={root}.')


def _file(kind, path, folder, split):
  """The Shard of a file, known by its name, size and time."""
  stat = path.stat()
  key = f'{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns} {kind.name} {split}'
  read = documents.lines if kind.lines else documents.texts
  return corpus.Shard(key, _grouped(kind, split, lambda: read(path)))


def _prepared(kind, builder, split):
  """The Shards of a TFDS dataset, CHUNK examples each; all of a set of lines."""
  source = prepared.read(builder, split)
  if 'text' not in builder.info.features:
    raise ValueError(f'Dataset {builder.name} in {builder.data_dir}: its features are {sorted(builder.info.features)}, '
                     'and texts are read from `text`. Prepare it with one.')
  size = len(source) if kind.lines else CHUNK

  def texts(first):
    for start in range(first, min(first + size, len(source)), documents.ROWS):
      some = range(start, min(start + documents.ROWS, first + size, len(source)))
      yield from (example['text'].decode() for example in source.__getitems__(list(some)))

  key = f'{builder.info.full_name} {builder.data_dir} {builder.info.splits[split].num_bytes} {split}'
  return [corpus.Shard(f'{key} {first}', _grouped(kind, split, functools.partial(texts, first)))
          for first in range(0, len(source), size)]


def _grouped(kind, split, read):
  """() -> documents, of () -> what `kind` has in rows."""
  return (lambda: articles(read(), split == 'train')) if kind.lines else read


def articles(lines, apart):
  """Yields the lines joined by two ends of line: each article if they are `apart`, else all in one."""
  some = []
  for line in lines:
    line = line if line.strip() else ''
    if apart and ARTICLE.fullmatch(line) and any(some):
      yield '\n\n'.join(some)
      some = []
    some.append(line)
  if some:
    yield '\n\n'.join(some)


def tokenizer_of(name):
  """The tokenizer of a published network, of a file, or of a folder."""
  if not name:
    raise ValueError("data.options.tokenizer '': texts are read by the tokenizer of a network. Give a tokenizer.json, "
                     f'the folder that holds one, or one of {list(published.PUBLISHED)}.')
  if name in published.PUBLISHED:
    return published.reader(published.located(name)).tokenizer()
  return tokenizers.from_json(pathlib.Path(name).expanduser())


def token(tokenizer, text):
  """The number of the token `text`."""
  number = tokenizer.token_to_id(text)
  if number is None:
    added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    raise ValueError(f'data.options.separator {text!r}: the tokenizer has no such token. '
                     f'{names.suggest(text, added)}')
  return number
