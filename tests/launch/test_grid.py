"""Grids and searches as words, without a process."""

import itertools

import pytest

from launch import grid


def test_every_combination_once_the_last_key_fastest():
  axes = dict([grid.listed(':bits=2,3,4'), grid.listed('seed=0..4')])
  found = grid.combinations(axes)
  assert [(s[':bits'], s['seed']) for s in found] == list(itertools.product('234', '01234'))


def test_no_axis_is_one_run():
  assert grid.combinations({}) == [{}]


@pytest.mark.parametrize('text, values', [
    ('seed=3', ['3']), ('seed=0..2,7', ['0', '1', '2', '7']), ('seed=-1..1', ['-1', '0', '1']),
    ('model.sizes=(64,10),(64, 16, 10)', ['(64,10)', '(64, 16, 10)']), ('model.name=mlp.MLP', ['mlp.MLP']),
    ('init_from=../a', ['../a']), ('data.test=test[:64]', ['test[:64]']), ('note=a=b', ['a=b'])])
def test_values(text, values):
  assert grid.listed(text)[1] == values


@pytest.mark.parametrize('text, space', [
    ('rate=1e-4..1e-1', grid.Between(1e-4, 1e-1)), ('rate=log:1e-4..1e-1', grid.Between(1e-4, 1e-1, True)),
    ('width=8..64', grid.Between(8, 64)), ('name=adamw,sgd', grid.Choices(('adamw', 'sgd')))])
def test_spaces(text, space):
  found = grid.searched(text)[1]
  assert found == space
  if isinstance(space, grid.Between):
    assert type(found.low) is type(space.low)


@pytest.mark.parametrize('of, text, words', [
    (grid.listed, 'seed', 'is no <key>=<value>'), (grid.listed, 'seed=', 'is no'), (grid.listed, 'seed=1,,2', 'is no'),
    (grid.listed, ':=1', 'is no'), (grid.listed, 'seed=4..0', 'smaller number first'),
    (grid.listed, 'rate=0.1..0.2', '--search rate=0.1..0.2'), (grid.listed, 'rate=log:1..2', '--search'),
    (grid.listed, 'seed=1,1', 'twice'), (grid.listed, 'seed=0..2,1', 'twice'),
    (grid.searched, 'rate=0.1', 'nothing to search'), (grid.searched, 'rate=log:0..1', 'above 0'),
    (grid.searched, 'rate=1..1', 'smaller number to a larger'), (grid.searched, 'rate=a..b', 'no range'),
    (grid.searched, 'rate=nan..1', 'no range')])
def test_wrong_words(of, text, words):
  with pytest.raises(ValueError, match='.*' + words.replace('.', r'\.')):
    of(text)


def test_the_command_is_the_one_that_a_person_types():
  settings = {':bits': '2', 'optimizer.learning_rate': '0.01', 'model.sizes': '(64, 10)'}
  assert grid.command(('qat', 'train'), 'configs/mnist.py:quantizer=lsq', settings, 'runs/a') == (
      'qat', 'train', '--config', 'configs/mnist.py:quantizer=lsq,bits=2', '--config.optimizer.learning_rate=0.01',
      '--config.model.sizes=(64, 10)', '--workdir', 'runs/a')


def test_the_digest_is_of_the_whole_config():
  one = grid.digest(('qat', 'train'), dict(a=1, b=dict(c=2)))
  assert one == grid.digest(('qat', 'train'), dict(b=dict(c=2), a=1))
  assert len({one, grid.digest(('qat', 'ptq'), dict(a=1, b=dict(c=2))),
              grid.digest(('qat', 'train'), dict(a=1, b=dict(c=3)))}) == 3


def test_folders_hold_no_strange_letters():
  name = grid.folder({'model.sizes': '(64, 10)', 'init_from': '/a/b', ':x': 'y' * 99}, '0123abcd')
  assert grid.NOT_NAME.search(name) is None and name.endswith('-0123abcd') and len(name) < 80
  assert grid.folder({}, '0123abcd') == 'run-0123abcd'
