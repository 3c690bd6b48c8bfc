"""C4 and WikiText in the forms in which they lie on disk, tokenized once and cut into rows."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from qat.run import corpus
from qat.run import data
from qat.run import documents
from qat.run import text_sets
from qat.run import texts
from tests.run import tiny_data, tiny_finetune

END = '<|endoftext|>'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """All forms: c4/, wikitext/, and TFDS's, and a tokenizer."""
  root = tmp_path_factory.mktemp('texts')
  tiny_data.c4_files(root / 'c4')
  tiny_data.wikitext_parquet(root / 'wikitext')
  tiny_data.tokenizer(root)
  for kind in (tiny_data.C4, tiny_data.Wikitext):
    tiny_data.prepare(kind, root / 'tfds')
  return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('QAT_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'tokens'


def load(folder, name, split, form=None, **options):
  options = dict(dict(tokenizer=str(folder), separator=END, length=32), **options)
  return data.load(name, split, str(folder / (form or name)), **options)


def text(source):
  """All that the rows of a source say."""
  rows = source.take(np.arange(len(source)))['tokens']
  return tiny_finetune.tokenizer().decode([*rows[:, :-1].ravel(), rows[-1, -1]], skip_special_tokens=False)


@pytest.mark.parametrize('form', ['c4', 'tfds'])
def test_rows_of_c4_are_its_documents_one_after_the_other(folder, form):
  source = load(folder, 'c4', 'train', form)
  batch = source.take(np.array([3, 0]))
  assert batch['tokens'].shape == (2, 33) and batch['tokens'].dtype == np.int32
  wanted = ''.join(t + END for t in tiny_data.sentences(24))
  assert wanted.startswith(text(source)) and len(source) == (len(''.join(tiny_data.sentences(24))) + 24 - 1) // 32
  assert source.vocab_size == tiny_finetune.tokenizer().get_vocab_size()


def test_rows_overlap_by_the_token_that_is_predicted(folder):
  rows = load(folder, 'c4', 'train').take(np.arange(5))['tokens']
  np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])


@pytest.mark.parametrize('form', ['wikitext', 'tfds'])
def test_articles_of_wikitext_train_apart_and_are_tested_in_one(folder, form):
  train, test = (load(folder, 'wikitext', split, form) for split in ('train', 'test'))
  lines = [line if line.strip() else '' for line in tiny_data.wikitext_lines(12, 2)]
  assert '\n\n'.join(lines).startswith(text(test)[:500])
  assert END not in text(test)
  assert text(train).count(END) == 11 + text(train).endswith(END) and f'{END} = Article 1 = \n' in text(train)


def test_the_tokens_of_a_test_are_those_that_papers_measure_on(folder):
  """'\\n\\n'.join(rows), without a separator: what GPTQ's code encodes."""
  source = load(folder, 'wikitext', 'test', separator='')
  import pyarrow.parquet
  rows = pyarrow.parquet.read_table(next((folder / 'wikitext').rglob('test-*.parquet')))['text'].to_pylist()
  ids = tiny_finetune.tokenizer().encode('\n\n'.join(rows)).ids
  np.testing.assert_array_equal(source.take(np.arange(len(source)))['tokens'][:, :-1].ravel(),
                                ids[:32 * len(source)])


def test_the_first_release_of_wikitext_is_read_too(folder, tmp_path):
  for split in ('train', 'valid'):
    (tmp_path / f'wiki.{split}.raw').write_text(''.join(
        line or ' \n' for line in tiny_data.wikitext_lines(12, 0 if split == 'train' else 1)))
  first = data.load('wikitext', 'train', str(tmp_path), tokenizer=str(folder), separator=END, length=32)
  assert text(first) == text(load(folder, 'wikitext', 'train'))
  valid = data.load('wikitext', 'validation', str(tmp_path), tokenizer=str(folder), length=32)
  assert ' = Article 11 = ' in text(valid)


@pytest.mark.parametrize('split, wanted', [
    ('train[:3]', range(3)), ('train[10:14]', range(10, 14)), ('train[-1:]', [23]),
    ('train[:2]+train[20:21]', [0, 1, 20])])
def test_a_slice_counts_documents(folder, split, wanted):
  """Across the end of a file."""
  there = tiny_data.sentences(24)
  assert ''.join(there[i] + END for i in wanted).startswith(text(load(folder, 'c4', split, length=16)))


def test_files_leaves_the_others_unread(folder, cache):
  load(folder, 'c4', 'train', files=1)
  assert len(list(cache.iterdir())) == 1
  load(folder, 'c4', 'train')
  assert len(list(cache.iterdir())) == 2


def test_what_is_tokenized_is_not_read_again(folder, cache, monkeypatch):
  first = text(load(folder, 'c4', 'train'))
  monkeypatch.setattr(documents, 'json_lines', None)
  monkeypatch.setattr(documents, 'READERS', {'.json.gz': lambda path: 1 / 0})
  assert text(load(folder, 'c4', 'train')) == first
  assert load(folder, 'c4', 'train').parts[0].dtype == np.uint16


def test_a_process_that_is_killed_leaves_whole_shards_only(folder, cache):
  def texts_of_two():
    yield 'one'
    raise KeyboardInterrupt

  tokenizer = tiny_finetune.tokenizer()
  with pytest.raises(KeyboardInterrupt):
    corpus.tokenized(corpus.Shard('a 1', texts_of_two), tokenizer, None)
  assert not list(cache.iterdir())
  found = corpus.tokenized(corpus.Shard('a 1', lambda: iter(['one', '', 'two'])), tokenizer, 7)
  np.testing.assert_array_equal(found.ends, [4, 5, 9])
  assert tokenizer.decode([int(i) for i in found.tokens[:3]]) == 'one' and found.tokens[4] == 7
  empty = corpus.tokenized(corpus.Shard('b', lambda: iter([])), tokenizer, 7)
  assert len(empty.tokens) == len(empty.ends) == 0


def test_a_restored_position_goes_on_with_the_same_rows(folder):
  source = load(folder, 'c4', 'train')
  straight = data.batches(source, 5, seed=1)
  for _ in range(7):
    next(straight)
  state = json.loads(json.dumps(straight.get_state()))
  resumed = data.batches(source, 5, seed=1)
  resumed.set_state(state)
  for _ in range(6):
    np.testing.assert_array_equal(next(straight)['tokens'], next(resumed)['tokens'])


def test_an_epoch_has_every_row_once(folder):
  source = load(folder, 'c4', 'train')
  iterator = data.batches(source, len(source), seed=0)
  rows = lambda: sorted(row.tobytes() for row in next(iterator)['tokens'])
  everything = sorted(row.tobytes() for row in source.take(np.arange(len(source)))['tokens'])
  assert rows() == everything == rows()


def test_calibration_draws_places_within_documents(folder):
  parts = text_sets.tokens(text_sets.C4, 'train', str(folder / 'c4'), tiny_finetune.tokenizer(), variant='en')
  drawn = corpus.drawn(parts, 20, 100, seed=0)
  assert drawn.shape == (20, 100) and drawn.dtype == np.int32
  there = tiny_data.sentences(24)
  said = [tiny_finetune.tokenizer().decode(row.tolist()) for row in drawn]
  assert all(any(row in t for t in there) for row in said) and len(set(said)) > 15
  np.testing.assert_array_equal(drawn, corpus.drawn(parts, 20, 100, seed=0))
  with pytest.raises(ValueError, match='no document has so many'):
    corpus.drawn(parts, 1, 10_000, seed=0)


def test_articles_are_documents_to_fine_tune_on(folder):
  reader = texts.Reader(tiny_finetune.tokenizer(), None, 'here')
  options = dict(data_dir=str(folder / 'wikitext'), variant='wikitext-103-raw-v1')
  train, test = (texts.load('wikitext', split, reader, **options) for split in ('train', 'test'))
  assert (len(train), len(test)) == (12, 1) and train[0].counted.all()


# Files


def test_files_of_a_split_have_it_as_a_word(tmp_path):
  for name in ('en/c4-train.00000-of-00002.json.gz', 'train/a.txt', 'b.train.jsonl', 'trained.jsonl', 'train.bin',
               '.cache/train.jsonl', 'validation.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('')
  found = [p.relative_to(tmp_path).as_posix() for p in documents.files(tmp_path, 'train')]
  assert found == ['b.train.jsonl', 'en/c4-train.00000-of-00002.json.gz', 'train/a.txt']


def test_any_folder_of_texts_is_read_as_c4(folder, tmp_path):
  (tmp_path / 'train').mkdir()
  (tmp_path / 'train' / 'a.txt').write_text('First file.\n')
  (tmp_path / 'train' / 'b.jsonl').write_text('{"text": "Second."}\n\n{"text": "Third."}\n')
  source = data.load('c4', 'train', str(tmp_path), tokenizer=str(folder), separator=END, length=4)
  assert f'First file.\n{END}Second.{END}Third.{END}'.startswith(text(source))


# Wrong input


def test_what_is_missing_says_how_to_get_it(folder, tmp_path):
  with pytest.raises(ValueError, match=(
      r"Dataset 'c4': .*there is nothing\. Type `hf download allenai/c4 --repo-type dataset --include .*`tfds build "
      r'c4/en --file_format=array_record')):
    load(folder, 'c4', 'train', form='none')
  with pytest.raises(ValueError, match=(
      r"Dataset 'wikitext': .* no files of a split 'test' .*`hf download Salesforce/wikitext --repo-type dataset --inc"
      r"lude 'wikitext-2-raw-v1/\*' --local-dir")):
    data.load('wikitext', 'test', str(tmp_path), tokenizer=str(folder), variant='wikitext-2-raw-v1')


@pytest.mark.parametrize('options, words', [
    (dict(tokenizer=''), 'Give a tokenizer.json, the folder that holds one, or one of'),
    (dict(separator='</s>'), "the tokenizer has no such token"), (dict(length=0), r'Rows of 0 \+ 1 tokens'),
    (dict(length=10 ** 6), 'the texts have 2,709 in all'), (dict(lengths=3), r"Options \['length', 'lengths', "),
])
def test_wrong_options(folder, options, words):
  with pytest.raises(ValueError, match=words):
    load(folder, 'c4', 'train', **options)


def test_a_tokenizer_that_is_not_there(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match='Give a tokenizer.json, or the folder that holds one'):
    load(folder, 'c4', 'train', tokenizer=str(tmp_path))


@pytest.mark.parametrize('name, content, words', [
    ('train.jsonl', b'{"text": 3}', 'train.jsonl, line 1: it has no "text"'),
    ('train.jsonl', b'{"text"', 'train.jsonl, line 1: it is no JSON'),
    ('train.json.gz', gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:60], 'The download was cut: get it anew'),
    ('train.json.gz', b'no gzip', 'The download was cut: get it anew'),
    ('train.txt', b'\xff\xfe\xfa', 'it is no text in UTF-8'),
    ('train.parquet', b'PAR1', 'it is no Parquet file')])
def test_files_that_are_damaged(folder, tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=words):
    data.load('c4', 'train', str(tmp_path), tokenizer=str(folder), length=4)


def test_a_parquet_file_of_other_columns(folder, tmp_path):
  import pyarrow.parquet
  pyarrow.parquet.write_table(pyarrow.table(dict(content=['a'])), tmp_path / 'train.parquet')
  with pytest.raises(ValueError, match=r"its columns are \['content'\], and texts are read from `text`"):
    data.load('c4', 'train', str(tmp_path), tokenizer=str(folder), length=4)


def test_parquet_without_pyarrow(folder, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
  with pytest.raises(ValueError, match='Type `pip install pyarrow`'):
    list(documents.texts(pathlib.Path('train.parquet')))
