"""ImageNet and CIFAR-10 in the forms in which they lie on disk, and what is drawn of them."""

import json

import numpy as np
from PIL import Image
import pytest

from qat.run import augment
from qat.run import data
from qat.run import images
from qat.run import mixing
from tests.run import tiny_data

AUGMENT = (dict(name='random_resized_crop'), dict(name='flip'), dict(name='rand_augment'))
STRONG = dict(augment=AUGMENT, mixup=0.2, cutmix=1.0, smoothing=0.1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """All forms: folders/, cifar-10-batches-bin/, and TFDS's."""
  root = tmp_path_factory.mktemp('images')
  tiny_data.image_folder(root / 'folders')
  tiny_data.cifar_batches(root)
  for kind in (tiny_data.Imagenet2012, tiny_data.Cifar10):
    tiny_data.prepare(kind, root / 'tfds')
  return root


@pytest.mark.parametrize('form, train, validation', [('folders', 24, 12), ('tfds', 24, 8)])
def test_imagenet(folder, form, train, validation):
  load = lambda split, **options: data.load('imagenet2012', split, str(folder / form), size=24, resize=28, **options)
  source = load('train', **STRONG)
  assert (len(source), len(load('validation')), source.classes) == (train, validation, 3)
  batch = next(data.batches(source, 8, seed=0))
  assert batch['image'].shape == (8, 24, 24, 3) and batch['image'].dtype == np.float32
  np.testing.assert_allclose(batch['targets'].sum(1), 1, atol=1e-5)
  assert sorted(load('train').take(np.arange(train))['label']) == sorted([0, 1, 2] * (train // 3))
  assert len(load('train[:50%]')) == train // 2


def test_evaluation_sees_the_centre_of_each_file(folder):
  source = data.load('imagenet2012', 'validation', str(folder / 'folders'), size=24, resize=28)
  batch = source.take(np.array([5]))
  path = folder / 'folders' / 'val' / tiny_data.CLASSES[1] / f'{tiny_data.CLASSES[1]}_1.JPEG'
  view = augment.CentreCrop(24, 28)(Image.open(path))
  want = (np.asarray(view) / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
  np.testing.assert_allclose(batch['image'][0], want, atol=1e-5)
  assert batch['label'] == [1]
  np.testing.assert_array_equal(batch['targets'], [[0, 1, 0]])


@pytest.mark.parametrize('where', ['', 'cifar-10-batches-bin'])
def test_cifar_batches_are_read_as_they_were_written(folder, tmp_path, where):
  made = tiny_data.cifar_batches(tmp_path)
  train, test = (data.load('cifar10', split, str(tmp_path / where)) for split in ('train', 'test'))
  assert (len(train), len(test)) == (40, 16)
  pixels, labels = made['data_batch_2']
  batch = train.take(np.arange(8, 16))
  np.testing.assert_array_equal(batch['label'], labels)
  mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
  np.testing.assert_allclose(batch['image'], (pixels / 255 - mean) / deviation, atol=1e-5)
  assert len(data.load('cifar10', 'train[-3:]', str(tmp_path / where))) == 3


def test_cifar_of_tfds_is_normalized_alike(folder):
  source = data.load('cifar10', 'test', str(folder / 'tfds'))
  batch = source.take(np.arange(16))
  assert batch['image'].shape == (16, 32, 32, 3) and sorted(set(batch['label'])) == list(range(10))
  raw = batch['image'] * np.array(images.CIFAR10[1], np.float32) + np.array(images.CIFAR10[0], np.float32)
  np.testing.assert_allclose(raw * 255, np.round(raw * 255), atol=1e-3)  # Whole numbers: PNG loses nothing.


# What is drawn


def test_the_same_seed_draws_the_same_pixels_and_another_others(folder):
  source = data.load('imagenet2012', 'train', str(folder / 'folders'), size=16, resize=18, **STRONG)
  draw = lambda seed: [next(it)['image'] for it in [data.batches(source, 8, seed=seed)] for _ in range(4)]
  a, b, c = draw(0), draw(0), draw(1)
  np.testing.assert_array_equal(a, b)
  assert (np.array(a) != np.array(c)).any()


@pytest.mark.parametrize('step', [1, 5])
def test_a_restored_position_goes_on_with_the_same_pixels(folder, step):
  """Across the end of an epoch, of 3 batches; threads have read ahead."""
  source = data.load('imagenet2012', 'train', str(folder / 'folders'), size=16, resize=18, **STRONG)
  straight = data.batches(source, 8, seed=1)
  for _ in range(step):
    next(straight)
  state = json.loads(json.dumps(straight.get_state()))
  resumed = data.batches(source, 8, seed=1)
  resumed.set_state(state)
  for _ in range(4):
    a, b = next(straight), next(resumed)
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}


def test_an_example_is_seen_otherwise_in_each_epoch(folder):
  source = data.load('cifar10', 'train[:1]', str(folder), augment=(dict(name='padded_crop'), dict(name='flip')))
  iterator = data.batches(source, 1, seed=0)
  assert len({next(iterator)['image'].tobytes() for _ in range(8)}) > 4


def test_parts_of_a_batch_are_what_the_whole_has(folder):
  """As machines that share a batch read them."""
  source = data.load('cifar10', 'train', str(folder), augment=(dict(name='flip'),), mixup=0.3, smoothing=0.1)
  indices, positions = np.arange(8), np.arange(16, 24)
  whole = source.draw(indices, positions, 3)
  for rows in (np.arange(4), np.arange(4, 8), np.array([2, 3, 6, 7])):
    part = source.draw(indices[rows], positions[rows], 3)
    for key in whole:
      np.testing.assert_array_equal(part[key], whole[key][rows])
  with pytest.raises(ValueError, match='every machine reads an even part'):
    source.draw(indices[1:3], positions[1:3], 3)


def test_without_augmentation_training_sees_what_evaluation_does(folder):
  source = data.load('cifar10', 'train', str(folder))
  np.testing.assert_array_equal(source.draw(np.arange(4), np.arange(4), 0)['image'], source.take(np.arange(4))['image'])


# Wrong input


def test_what_is_missing_says_how_to_get_it(tmp_path):
  with pytest.raises(ValueError, match=(
      r"Dataset 'imagenet2012': it is not in .*ILSVRC2012_img_train.tar .*`tfds build imagenet2012 "
      rf'--file_format=array_record --manual_dir=TARS --data_dir={tmp_path}`.*--config.data.data_dir={tmp_path}')):
    data.load('imagenet2012', 'train', str(tmp_path))
  with pytest.raises(ValueError, match=r"Dataset 'cifar10': .*`curl -O https://www.cs.toronto.edu/~kriz/cifar-10-bin"):
    data.load('cifar10', 'train', str(tmp_path / 'none'))


@pytest.mark.parametrize('split, words', [
    ('test', r"Split 'test': the splits have nothing"), ('validation[:13]', r"the splits have {'validation': 12}"),
    ('validation[3:3]', 'is empty'), ('validation[', "Split 'validation\\['")])
def test_splits_that_are_not_there(folder, split, words):
  with pytest.raises(ValueError, match=words):
    data.load('imagenet2012', split, str(folder / 'folders'))


def test_files_that_are_damaged(tmp_path):
  tiny_data.image_folder(tmp_path / 'a', train=2, val=1)
  path = tmp_path / 'a' / 'train' / tiny_data.CLASSES[0] / f'{tiny_data.CLASSES[0]}_0.JPEG'
  path.write_bytes(path.read_bytes()[:200])
  source = data.load('imagenet2012', 'train', str(tmp_path / 'a'), size=16, resize=18)
  with pytest.raises(ValueError, match=f'{path}: it is no whole image'):
    source.take(np.array([0]))
  (tmp_path / 'a' / 'val' / 'n9').mkdir()
  with pytest.raises(ValueError, match=r"has the classes \['n9'\], which .*train does not have"):
    data.load('imagenet2012', 'validation', str(tmp_path / 'a'))
  tiny_data.cifar_batches(tmp_path / 'b')
  file = tmp_path / 'b' / 'cifar-10-batches-bin' / 'test_batch.bin'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match='test_batch.bin: its 49167 bytes are no records of 3073'):
    data.load('cifar10', 'test', str(tmp_path / 'b'))


def test_options_that_a_set_does_not_have(folder):
  with pytest.raises(ValueError, match=r"Options \['size'\] of dataset 'cifar10': those it has are \['augment', "):
    data.load('cifar10', 'train', str(folder), size=24)


def test_grey_and_transparent_images_become_rgb():
  for mode in ('L', 'RGBA', 'P', 'CMYK'):
    assert images.opened(np.zeros((2, 2, 3), np.uint8)).mode == 'RGB'
    image = Image.new(mode, (4, 3))
    assert image.convert('RGB').size == (4, 3)


def test_training_is_a_value():
  assert images.Training() == images.Training(mixing=mixing.Mixing()) and not images.PLAIN.mixing
