"""Sequences of tokens: what is kept, what counts, and that batches in parts have the mean of the whole."""

import numpy as np
import pytest

from qat.run import data
from qat.run import packing


def documents(*lengths, first=1):
  made = []
  for i, n in enumerate(lengths):
    tokens = np.arange(first, first + n, dtype=np.int32) + 100 * i
    made.append(packing.Document(tokens, np.ones(n, bool)))
  return made


def test_a_stream_has_each_token_once_and_the_separator_between():
  source = packing.stream(documents(5, 4), 4, pad=0)
  assert source.take(np.array([0, 1]))['tokens'].tolist() == [[1, 2, 3, 4], [5, 0, 101, 102]]
  assert len(source) == 2 and source.take(np.array([0]))['weights'].tolist() == [[1, 1, 1]]


def test_rows_are_cut_and_padded_and_padding_does_not_count():
  source = packing.rows(documents(6, 2, 1), 4, pad=9)
  batch = source.take(np.array([0, 1]))
  assert batch['tokens'].tolist() == [[1, 2, 3, 4], [101, 102, 9, 9]]
  # 4 of 6 targets count: 1 / (4 / 6).
  np.testing.assert_allclose(batch['weights'], [[1.5, 1.5, 1.5], [1.5, 0, 0]])


def test_the_mean_of_equal_parts_is_the_mean_over_tokens():
  source = packing.rows(documents(8, 2, 3, 5), 8, pad=0)
  weights = source.take(np.arange(4))['weights']
  losses = np.random.default_rng(0).normal(size=weights.shape)
  counted = np.concatenate([losses[i, :n - 1] for i, n in enumerate((8, 2, 3, 5))])
  parts = [np.mean(losses[i:i + 2] * weights[i:i + 2]) for i in (0, 2)]
  np.testing.assert_allclose(np.mean(parts), counted.mean(), rtol=1e-6)


def test_a_test_set_in_batches_of_any_size_has_the_mean_over_tokens():
  source = packing.Whole(packing.rows(documents(8, 2, 3, 5), 8, pad=0))
  losses = np.random.default_rng(0).normal(size=(4, 7))
  counted = np.concatenate([losses[i, :n - 1] for i, n in enumerate((8, 2, 3, 5))])
  for size in (1, 3, 4):
    sums = [(losses[i:i + size] * b['weights'][:len(losses[i:i + size])]).mean(1).sum()
            for i, b in zip(range(0, 4, size), data.epoch(source, size))]
    np.testing.assert_allclose(sum(sums) / 4, counted.mean(), rtol=1e-6)


def test_batches_by_length_waste_less_and_still_see_every_row():
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, 500, size=640)
  made = documents(*lengths)
  spent = {}
  for name in ('rows', 'rows_by_length'):
    source = getattr(packing, name)(made, 512, pad=0)
    batches = data.batches(source, 8, seed=1, repeat=False)
    seen = [b['tokens'] for b in batches]
    spent[name] = sum(x.size for x in seen)
    firsts = sorted(int(x[0]) for tokens in seen for x in tokens)
    assert firsts == [1 + 100 * i for i in range(640)]
  assert spent['rows_by_length'] < 0.75 * spent['rows']
  assert lengths.sum() <= spent['rows_by_length']


def test_batches_by_length_are_shuffled_and_the_same_again():
  source = packing.rows_by_length(documents(*range(2, 34)), 64, pad=0)
  orders = [source.order(np.random.default_rng((s, 0)), 4).tolist() for s in (0, 0, 1)]
  assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(32))


def test_too_little_text():
  with pytest.raises(ValueError, match=r'have 6 tokens in all, and a sequence takes 8'):
    packing.stream(documents(5), 8, pad=0)
  with pytest.raises(ValueError, match='No document has 2 tokens'):
    packing.rows(documents(1, 1), 8, pad=0)
  answers = [packing.Document(np.arange(9, dtype=np.int32), np.arange(9) > 6)]
  with pytest.raises(ValueError, match='None of the .* tokens counts'):
    packing.rows(answers, 4, pad=0)
